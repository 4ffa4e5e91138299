"""The model card: what a run says of itself, as a README.md that claims nothing else.

    rlsd_run.json, metrics.jsonl -> {"README.md": bytes, "training_curves.png": bytes}

Whatever comes from a run, a reward's name or a column's, is text: no Markdown, HTML or YAML in it comes to life.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from trl_rlsd.hub.contents import ADAPTER_CONFIG


TEMPLATE = Path(__file__).with_name("model_card.md")
CARD_FILE = "README.md"
CURVES_FILE = "training_curves.png"
CURVES = {"reward": "reward", "completions/mean_length": "tokens of a completion", "entropy": "entropy (nats)"}
TABLE_STEPS = 6
EVALUATED = ("eval_dataset", "eval_rows", "eval_completions")  # what a line of metrics.jsonl says of its evaluation

_TAGS_OF_CREDIT = ("grpo", "opsd")
# a word or a number, in which no character means anything to Markdown
_PLAIN = re.compile(r"[A-Za-z0-9]+(?:[_/-][A-Za-z0-9]+)*|-?\d+(?:\.\d+)*(?:e-?\d+)?")


@dataclass(frozen=True)
class Run:
    """What is known of a run. `step`: of the checkpoint that is published, None for the end of the run."""

    record: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]] = ()
    step: int | None = None
    training: list[Mapping[str, Any]] = field(init=False)
    evaluations: list[Mapping[str, Any]] = field(init=False)

    def __post_init__(self):
        lines = [line for line in self.metrics if _number(line["step"])]
        object.__setattr__(self, "training", [line for line in lines if _number(line.get("reward"))])
        object.__setattr__(self, "evaluations", [line for line in lines if _number(line.get("eval_reward"))])

    def part(self, name: str) -> Any:
        """A part of the record, None where it is not known."""
        return (self.record or {}).get(name)


def make(
    run: Run,
    repo_id: str,
    files: Collection[str],
    *,
    base_model: str | None,
    license: str | None = None,
    revision: str | None = None,
) -> dict[str, bytes]:
    """The card and its picture, for the model that `files` are."""
    made = {}
    curves = _curves(run.training)
    if curves and find_spec("matplotlib"):
        made[CURVES_FILE] = _draw(curves)
    vision = any(name in files for name in ("processor_config.json", "preprocessor_config.json"))
    chats = "chat_template.jinja" in files or "chat_template.json" in files
    card = ModelCard.from_template(
        _metadata(run, repo_id, files, base_model, license, vision),
        template_path=str(TEMPLATE),
        name=text(repo_id.split("/")[-1]),
        repo_id=repo_id,
        revision=revision if revision not in (None, "main") else None,
        base_model=base_model,
        adapter=ADAPTER_CONFIG in files,
        vision=vision,
        chats=chats,
        own_tokenizer=any(name.startswith("tokenizer") for name in files) or vision,
        run=run,
        credit=run.part("credit"),
        picture=CURVES_FILE if CURVES_FILE in made else None,
        curve_rows=[] if CURVES_FILE in made else _curve_rows(curves),
        evaluations=[_evaluation(run, own) for own in _comparable(run)],
        settings=_table(run.part("settings")),
        adapter_settings=_table(run.part("peft")),
        alarms=sorted({text(line["alarm"]) for line in run.metrics if "alarm" in line}),
        text=text,
    )
    # what a template leaves out leaves its lines empty
    return {CARD_FILE: re.sub(r"\n{3,}", "\n\n", str(card)).encode("utf-8"), **made}


def text(value: Any) -> str:
    """A value as Markdown that shows it, and does nothing else, in a table too."""
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    plain = " ".join(plain.split())
    if _PLAIN.fullmatch(plain):
        return plain
    plain = re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", escape(plain, quote=False))
    return plain.replace(":", "&#58;").replace("@", "&#64;")  # no links, no mentions


def _metadata(
    run: Run, repo_id: str, files: Collection[str], base_model: str | None, license: str | None, vision: bool
) -> ModelCardData:
    adapter = ADAPTER_CONFIG in files
    dataset = (run.part("dataset") or {}).get("name")
    on_hub = isinstance(dataset, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset)
    credit, peft = run.part("credit"), run.part("peft") or {}
    tags = ["trl", "rlsd", "generated_from_trainer"]
    tags += [credit] if credit in _TAGS_OF_CREDIT else []
    tags += [str(peft.get("peft_type", "")).lower()] if re.fullmatch(r"\w+", str(peft.get("peft_type", ""))) else []
    tags += [f"base_model:adapter:{base_model}"] if adapter else []
    tags += [tag for tag in run.part("tags") or [] if tag not in tags]
    task = "image-text-to-text" if vision else "text-generation"
    results: dict[str, Any] = {}
    comparable = _comparable(run)
    after = _after(comparable[0]) if len(comparable) == 1 else None
    if on_hub and after:
        name = "mean reward" if after.get("eval_even") is True else "reward"
        measured = EvalResult(task, dataset, dataset, "reward", after["eval_reward"], metric_name=name)
        results = {"eval_results": [measured], "model_name": repo_id.split("/")[-1]}
    return ModelCardData(
        base_model=base_model,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        datasets=[dataset] if on_hub else None,
        license=license,
        tags=tags,
        **results,
    )


def _comparable(run: Run) -> list[list[Mapping[str, Any]]]:
    """The evaluations, those of one dataset, and of as many of its rows and completions, together."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in run.evaluations:
        found.setdefault(json.dumps([line.get(name) for name in EVALUATED]), []).append(line)
    return list(found.values())


def _after(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The last evaluation, unless it came before training."""
    return evaluations[-1] if evaluations[-1]["step"] > 0 else None


def _evaluation(run: Run, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Before and after, what was measured of it."""
    after = _after(evaluations)
    before = evaluations[0] if evaluations[0]["step"] == 0 else None
    values = [line for line in (before, after) if line is not None] or evaluations[-1:]
    names = [name for name in values[-1] if _shown(name)]
    rows = [[text(_title(name)), *(_value(line.get(name)) for line in values)] for name in names]
    heads = [f"Before training (step {line['step']})" if line is before else f"Step {line['step']}" for line in values]
    # lines of older runs do not say of how many; the record does, of the only dataset that it knows
    record = {"eval_rows": (run.part("dataset") or {}).get("eval_rows")}
    record["eval_completions"] = run.part("eval_completions")
    _, rows_read, completions = (values[-1].get(name, record.get(name)) for name in EVALUATED)
    even = [line.get("eval_even") for line in values]
    return {
        "name": values[-1].get("eval_dataset"),
        "heads": heads,
        "rows": rows,
        "of_rows": rows_read,
        "completions": completions,
        "even": all(one is True for one in even),
        "uneven": any(one is False for one in even),
        "right": "eval_rlsd/right" in names,
    }


def _shown(name: str) -> bool:
    own = name.removeprefix("eval_")
    return own != name and (own in (*CURVES, "rlsd/right") or re.fullmatch("rewards/.*/mean", own) is not None)


def _title(name: str) -> str:
    name = name.removeprefix("eval_")
    return CURVES.get(name) or {"rlsd/right": "share of right completions"}.get(name) or name


def _number(value: Any) -> bool:
    """Whether it is one that can be drawn."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # JSON's whole numbers have no end
        return False


def _value(value: Any) -> str:
    return f"{value:.4g}" if _number(value) else "not measured"


def _table(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [(text(name), text(value)) for name, value in sorted((values or {}).items())]


def _curves(training: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """By metric, its steps and values; only what was logged at two steps or more."""
    curves = {name: [(line["step"], line[name]) for line in training if _number(line.get(name))] for name in CURVES}
    return {name: points for name, points in curves.items() if len(points) > 1}


def _curve_rows(curves: Mapping[str, list[tuple[int, float]]]) -> list[list[str]]:
    """A table of a few steps, its head first."""
    if not curves:
        return []
    steps = sorted({step for points in curves.values() for step, _ in points})
    chosen = sorted({steps[round(i * (len(steps) - 1) / (TABLE_STEPS - 1))] for i in range(TABLE_STEPS)})
    rows = [["Step", *(CURVES[name] for name in curves)]]
    rows += [[str(step), *(_value(dict(points).get(step)) for points in curves.values())] for step in chosen]
    return rows


def _draw(curves: Mapping[str, list[tuple[int, float]]]) -> bytes:
    """A panel for each metric, over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 2.8), layout="constrained")
    FigureCanvasAgg(figure)  # drawn without pyplot, whose backend belongs to the user
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color="#1f4e79", linewidth=1.5)
        axes.set(xlabel="optimizer step", title=CURVES[name])
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()
