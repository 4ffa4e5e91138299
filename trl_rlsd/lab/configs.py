"""Comparing config files of the user's: each run is an `accelerate launch` of its own, on any number of devices.

config files x seeds -> runs -> result files
python -m trl_rlsd.lab.configs FOLDER EVERY ROWS METHOD --config FILE ...      one run, in the launcher
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, fields
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_callback import PrinterCallback
from trl import ModelConfig

from trl_rlsd import __version__
from trl_rlsd.config import RLSDConfig
from trl_rlsd.files import write_whole
from trl_rlsd.lab.builtin import trained
from trl_rlsd.lab.compare import Run, begin, check_options, finish, report, unfinished
from trl_rlsd.lab.measure import MeasureCallback
from trl_rlsd.train import RLSDScriptArguments, build_trainer, launcher_arguments, make_parser


# what makes two runs the same start, the same problems, the same budget, and the same meaning of "right" and "leak"
_SHARED = (
    "model_name_or_path",
    "model_revision",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "reward_funcs",
    "reward_weights",
    "tools",
    "environment_factory",
    "contrast_reward_below",
    "leak_phrases",
    "max_steps",
    "num_train_epochs",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "generation_kwargs",
)
# of every run, over what its config says: measured here alone, one completion a problem
_OVERRIDES = {
    "report_to": "none", "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False,
    "num_generations_eval": 1, "push_to_hub": False, "logging_strategy": "steps", "logging_steps": 1,
    "disable_tqdm": True,
}  # fmt: skip

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
    options = {"every": every, "held_out": held_out, "steps": steps}
    check_options(list(contents), baseline, seeds=seeds, target=target, **options)
    launchers = {name: _launcher(name, content, launch) for name, content in contents.items()}
    fixed = {**options, "launch": list(launch), "version": __version__}
    runs = [
        Run(name, seed, {"config": content, **fixed}, Path(output_dir) / name / f"seed-{seed}")
        for seed in range(1, seeds + 1)
        for name, content in contents.items()
    ]
    pending = unfinished(runs)
    results = ((run, lambda run=run: _launched(run, launchers[run.method])) for run in pending)
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
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for kind in (ModelConfig, RLSDConfig, RLSDScriptArguments)
        for field in fields(kind)
        if field.default is not MISSING or field.default_factory is not MISSING
    }
    (first, known), *others = contents.items()
    for name, content in others:
        for field in _SHARED:
            own, theirs = (one.get(field, defaults.get(field)) for one in (content, known))
            if own != theirs:
                raise ValueError(
                    f"{field}={own!r} in {name}, {theirs!r} in {first}: a comparison needs the same start, the same "
                    "problems and the same budget. Make them equal, or compare each with its own baseline."
                )
    return contents


def _launcher(name: str, content: dict[str, Any], launch: Sequence[str]) -> list[str]:
    """The launcher's arguments in a config and on the command line. The config's own fields are not built here: their
    checks depend on the number of processes. Raises: ValueError."""
    plain = {key: value for key, value in content.items() if key != "env"}
    rest = [*make_parser().set_defaults_with_config(**plain), *launch]
    try:
        with redirect_stderr(StringIO()):
            return launcher_arguments(rest)
    except SystemExit:
        raise ValueError(
            f"--config {name}: {' '.join(rest)} has something that is neither a field nor an argument of `accelerate "
            "launch`. Correct the name."
        ) from None


def _launched(run: Run, launcher: Sequence[str]) -> dict[str, Any]:
    """Train in processes of the launcher. Raises: RuntimeError, with what they told of."""
    folder, settings = run.folder, run.settings
    begin(run)
    overrides = {**_OVERRIDES, "seed": run.seed, "output_dir": str(folder / "model")}
    if settings["steps"]:
        overrides["max_steps"] = settings["steps"]
    # as it was when the comparison began, whatever happens to the file meanwhile
    config = folder / "config.yaml"
    write_whole(config, yaml.safe_dump({**settings["config"], **overrides}))
    own = [str(folder), str(settings["every"]), str(settings["held_out"]), run.method]
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launcher, "--module", __name__, *own,
        "--config", str(config),
    ]  # fmt: skip
    log, trained_result = folder / "log.txt", folder / "trained.json"
    trained_result.unlink(missing_ok=True)
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status or not trained_result.is_file():
        raise RuntimeError(f"it ended with status {status}: {_error(log.read_text())}")
    return {**json.loads(trained_result.read_text()), "seed": run.seed, "settings": settings}


def _error(log: str) -> str:
    """The last error that a process told of; the launchers' own, which follow it, say nothing."""
    told = [error for error in _ERROR.findall(log) if not error.startswith(("subprocess.", "torch.distributed."))]
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
    trainer.train(resume_from_checkpoint=_last_checkpoint(Path(args.output_dir)))
    if trainer.is_world_process_zero():
        result = {
            "method": method,
            "steps": trainer.state.global_step,
            "curve": measuring.curve,
            "localisation": None,
            **trained(trainer.state.log_history),
        }
        write_whole(folder / "trained.json", json.dumps(result))
    trainer.end()


def _last_checkpoint(folder: Path) -> str | None:
    """The newest that was written to its end, of which the trainer's state is the last file."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None


if __name__ == "__main__":
    main(sys.argv[1:])
