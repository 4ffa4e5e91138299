"""What runs left on disk, for their curves.

    output_dir -> metrics.jsonl, or the newest trainer_state.json; rlsd_run.json; the newest credit pictures -> Run

Points are (optimizer step, value); what is null or not finite is no point.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trl_rlsd.run_record import METRICS_FILE, read_metrics, read_record
from trl_rlsd.texts import visible


Points = list[tuple[int, float]]

# what a log says of its evaluation
EVALUATED = ("eval_dataset", "eval_rows", "eval_completions")
_ABOUT = (*EVALUATED, "eval_even")
_OF_TRANSFORMERS = ("loss", "runtime", "samples_per_second", "steps_per_second")


@dataclass(frozen=True)
class Run:
    """What one output_dir holds. `source`: the file its logs come from; `torn`: its lines that cannot be read."""

    name: str
    logs: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    source: str
    torn: int
    record: dict[str, Any]
    credit: Path | None

    @cached_property
    def curves(self) -> dict[str, Points]:
        """Metric -> its points."""
        found: dict[str, Points] = {}
        for log in self.logs:
            for name, value in log.items():
                if name not in _ABOUT and (usable := number(value)) is not None:
                    found.setdefault(name, []).append((log["step"], usable))
        return found

    @cached_property
    def evaluations(self) -> dict[str, Run]:
        """Name -> the run with those evaluations alone that can be compared: of one dataset, and of as many of its
        rows and completions. One dataset without a name is ""."""
        found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for log in self.logs:
            if any(name.startswith("eval_") for name in log):
                dataset, rows, completions = map(log.get, EVALUATED)
                key = ("" if dataset is None else visible(str(dataset)), _count(rows, "rows"))
                found.setdefault((*key, _count(completions, "completions")), []).append(log)
        datasets = [dataset for dataset, *_ in found]

        def name(key: tuple[str, str, str]) -> str:
            if len(found) == 1 or (key[0] and datasets.count(key[0]) == 1):
                return key[0]
            return ", ".join(filter(None, key)) or "dataset without a name"

        return {name(key): replace(self, logs=logs) for key, logs in found.items()}

    def points(self, *metrics: str) -> Points:
        """A metric over the steps, or the sum of several where all of them are there."""
        first, *others = (self.curves.get(name, []) for name in metrics)
        for other in others:
            values = dict(other)
            first = [(step, value + values[step]) for step, value in first if step in values]
        return first

    def setting(self, name: str, default: int) -> int:
        """A whole number of the settings, other than 0."""
        return int(number((self.record.get("settings") or {}).get(name)) or 0) or default

    @property
    def last_step(self) -> int:
        return max(log["step"] for log in self.logs)


def load_runs(output_dirs: Sequence[str | Path]) -> list[Run]:
    """The runs of some folders. Raises: see [`run_report`]."""
    folders = [Path(folder) for folder in output_dirs]
    if not folders:
        raise ValueError("no runs to report; pass the output_dir of at least one")
    if not all(folder.is_dir() for folder in folders):
        missing = next(folder for folder in folders if not folder.is_dir())
        raise ValueError(f"{missing} is no folder; pass the output_dir of a run")
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"a folder is given twice among {', '.join(map(str, folders))}; give each once")
    return [_load(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, each with as many of its parents' as tell it from the others."""
    names = []
    for folder in folders:
        ends = (["/".join(one.parts[-depth:]) for one in folders] for depth in range(1, len(folder.parts) + 1))
        own = ("/".join(folder.parts[-depth:]) for depth in range(1, len(folder.parts) + 1))
        names.append(
            next(visible(name) for name, all_names in zip(own, ends, strict=True) if all_names.count(name) == 1)
        )
    return names


def _load(folder: Path, name: str) -> Run:
    lines, torn = read_metrics(folder)
    usable = [line for line in lines if number(line["step"]) is not None]
    lines, torn = usable, torn + len(lines) - len(usable)
    source = METRICS_FILE
    if not any(map(_has_numbers, lines)):
        lines, source, torn = *_history(folder), 0
    if not any(map(_has_numbers, lines)):
        raise ValueError(
            f"{folder} holds no logs: looked for lines with metrics in {METRICS_FILE}, and for log_history in "
            "trainer_state.json and checkpoint-*/trainer_state.json. Pass a run's output_dir, after its first log"
        )
    pictures = sorted(folder.glob("completions/credit_*.html"), key=_number_in)
    return Run(
        name=name,
        logs=[_plainly_named(line) for line in lines if "alarm" not in line],
        alarms=[line for line in lines if "alarm" in line],
        source=source,
        torn=torn,
        record=read_record(folder) or {},
        credit=pictures[-1] if pictures else None,
    )


def _plainly_named(log: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's log, in which transformers' measures have their names without the dataset's."""
    # transformers 5.23: eval_<dataset>_runtime; the only trace of the dataset in trainer_state.json
    found = (re.fullmatch(r"eval_(.+)_runtime", name) for name in log)
    dataset = log["eval_dataset"] if "eval_dataset" in log else next((one[1] for one in found if one), None)
    if not isinstance(dataset, str):
        return log
    plain = {f"eval_{dataset}_{name}": f"eval_{name}" for name in _OF_TRANSFORMERS}
    return {"eval_dataset": dataset} | {plain.get(name, name): value for name, value in log.items()}


def _history(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The logs of the trainer state with the most steps, and where it lies in the folder."""
    found: tuple[int, list[dict[str, Any]], str] = (-1, [], "")
    for path in [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            steps, logs = int(state["global_step"]), [log for log in state["log_history"] if "step" in log]
        except (OSError, ValueError, TypeError, KeyError):  # not there, or cut off while it was written
            continue
        if steps > found[0]:
            found = steps, logs, path.relative_to(folder).as_posix()
    return found[1:]


def _number_in(path: Path) -> int:
    return int(re.sub(r"\D", "", path.stem) or 0)


def _has_numbers(log: Mapping[str, Any]) -> bool:
    return any(number(value) is not None for name, value in log.items() if name not in ("step", "time"))


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON's whole numbers have no end
        return None


def _count(value: Any, of: str) -> str:
    return "" if (count := number(value)) is None else f"{count:,.0f} {of}"
