"""Comparing config files of the user's: each run is an `accelerate launch` of its own, on any number of devices.

config files x seeds -> runs -> result files
python -m trl_rlsd.lab.configs FOLDER EVERY ROWS METHOD --config FILE --seed N ...      one run, in the launcher
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from trl_rlsd.lab.builtin import trained
from trl_rlsd.lab.compare import Run, finish, report, unfinished, write
from trl_rlsd.lab.measure import MeasureCallback
from trl_rlsd.train import build_trainer, launcher_arguments, make_parser


# what makes two runs the same start on the same problems
_SHARED = (
    "model_name_or_path",
    "model_revision",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "reward_funcs",
    "reward_weights",
)

_ERROR = re.compile(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception): .*)$", re.MULTILINE)


def compare_configs(
    output_dir: str,
    configs: Sequence[str],
    seeds: int = 3,
    *,
    target: float = 0.5,
    baseline: str | None = None,
    every: int = 20,
    held_out: int = 256,
    steps: int | None = None,
    launch: Sequence[str] = (),
) -> str:
    """Compare config files of `trl-rlsd train`, by the names of the files. Returns the table, which also stands in
    `comparison.md`, beside `comparison.png` and `comparison.json`.

    Each run trains with the config's own settings but for the seed, is measured every `every` steps on the first
    `held_out` rows of the test split, and does no reporting, evaluating or pushing of its own. An interrupted one goes
    on from its last checkpoint if the config saves any.

    Args:
        baseline: the name of the config that the others are compared with; None: the first.
        steps: `max_steps` of every run; None: as the config says.
        launch: arguments of `accelerate launch`, after those in the config.

    Raises:
        ValueError: the configs do not have the same start or problems, or the folder holds runs of other settings.
        RuntimeError: a run failed; the others are kept, and calling again does the failed ones.
    """
    contents = load_configs(configs)
    baseline = baseline or next(iter(contents))
    if baseline not in contents:
        raise ValueError(f"baseline={baseline!r} is not one of the configs: {', '.join(contents)}.")
    paths = dict(zip(contents, configs, strict=True))
    options = {"every": every, "held_out": held_out, "steps": steps}
    runs = [
        Run(name, seed, {"config": content, **options}, Path(output_dir) / name / f"seed-{seed}")
        for seed in range(1, seeds + 1)
        for name, content in contents.items()
    ]
    pending = unfinished(runs)
    results = ((run, lambda run=run: _launched(run, paths[run.method], launch)) for run in pending)
    finish(results, len(runs), len(runs) - len(pending))
    return report(runs, output_dir, target, baseline)


def load_configs(configs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Their contents by name, once it is known that they can be compared.

    Raises: ValueError, naming file, field and values.
    """
    contents: dict[str, dict[str, Any]] = {}
    for path in configs:
        if not Path(path).is_file():
            raise ValueError(f"--config {path}: there is no such file.")
        name, content = Path(path).stem, yaml.safe_load(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError(f"--config {path} holds no fields.")
        if name in contents:
            raise ValueError(f"--config {path}: another config is named {name!r}, too; methods go by file names.")
        contents[name] = content
    (first, known), *others = contents.items()
    for name, content in others:
        for field in _SHARED:
            if content.get(field) != known.get(field):
                raise ValueError(
                    f"{field}={content.get(field)!r} in {name}, {known.get(field)!r} in {first}: a comparison needs "
                    "the same start on the same problems. Make them equal, or compare each with its own baseline."
                )
    return contents


def _launched(run: Run, config: str, launch: Sequence[str]) -> dict[str, Any]:
    """Train in processes of the launcher. Raises: RuntimeError, with the end of what they printed."""
    folder, settings = run.folder, run.settings
    folder.mkdir(parents=True, exist_ok=True)
    overrides = {
        "seed": run.seed, "output_dir": folder / "model", "report_to": "none", "eval_strategy": "no",
        "push_to_hub": False, "logging_steps": 1, "logging_strategy": "steps", "disable_tqdm": True,
        **({"max_steps": settings["steps"]} if settings["steps"] else {}),
    }  # fmt: skip
    flags = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    parsed = make_parser().parse_args_and_config(
        ["--config", config, *flags], return_remaining_strings=True, separate_remaining_strings=True
    )
    launcher = launcher_arguments([*parsed[-2], *launch])
    own = [str(folder), str(settings["every"]), str(settings["held_out"]), run.method]
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launcher, "--module", __name__, *own,
        "--config", config, *flags,
    ]  # fmt: skip
    log = folder / "log.txt"
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    trained_result = folder / "trained.json"
    if status or not trained_result.is_file():
        raise RuntimeError(f"it ended with status {status}: {_error(log.read_text())}")
    return {**json.loads(trained_result.read_text()), "seed": run.seed, "settings": settings}


def _error(log: str) -> str:
    """The last error that a process told of; the launcher's own, which follows it, says nothing."""
    told = [error for error in _ERROR.findall(log) if not error.startswith("subprocess.")]
    return told[-1] if told else log[-300:]


def main(argv: list[str]) -> None:
    """One run, called by the launcher on every process."""
    folder, every, rows, method = Path(argv[0]), int(argv[1]), int(argv[2]), argv[3]
    sys.path.insert(0, ".")  # dotted paths may name modules beside the config
    script, args, model, rest = make_parser().parse_args_and_config(argv[4:], return_remaining_strings=True)
    launcher_arguments(rest)
    measuring = MeasureCallback(folder / "curve.jsonl", every)
    trainer = build_trainer(script, args, model, evaluates=True, evaluation_rows=rows, callbacks=[measuring])
    measuring.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    output = Path(args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if output.is_dir() else None)
    if trainer.is_world_process_zero():
        result = {
            "method": method,
            "steps": trainer.state.global_step,
            "curve": measuring.curve,
            "localisation": None,
            **trained(trainer.state.log_history),
        }
        write(folder / "trained.json", json.dumps(result))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1:])
