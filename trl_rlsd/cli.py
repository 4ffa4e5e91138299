"""The commands of `trl-rlsd`; `python -m trl_rlsd` is the same."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from importlib.util import find_spec
from subprocess import CalledProcessError
from typing import Any

from trl_rlsd import __version__


_HELP = """\
Train language models with RLSD: GRPO in which a teacher that has seen the answer says which tokens earned the credit.

In the order in which you are likely to want them:

  quickstart   watch it work: a small real run on the CPU, in about 7 minutes, without account or GPU
  doctor       what is installed, and for a config: its checks, the first prompts, whether it fits in memory
  inspect      look at the credit of each token before you train: given completions, or sampled ones
  train        train from a config file, flags, or both, on one process or many
  report       the curves of one run or several, as one page that needs no network
  compare      methods and seeds side by side, with intervals
  publish      the adapter on the Hugging Face Hub, with a card made from the run, and nothing that is private

Each has --help. In scripts: `from trl_rlsd import RLSDConfig, RLSDTrainer`, in the place of TRL's GRPO names.
"""

_EXAMPLES = """\
examples:
  trl-rlsd quickstart
  trl-rlsd doctor --config configs/t4_qlora_1b7.yaml
  trl-rlsd inspect --model_name_or_path Qwen/Qwen3-0.6B --prompt "What is 17 * 3?" --context 51 \\
      --completion "17 * 3 = 41" "17 * 3 = 51"
  trl-rlsd train --config configs/t4_qlora_1b7.yaml --max_steps 100
  trl-rlsd report rlsd-math another-run --html report.html
  trl-rlsd publish rlsd-math --repo-id me/qwen3-math-rlsd --dry-run
"""

_TRAIN_HELP = """\
Train with RLSD. Every field of RLSDConfig and of TRL's ModelConfig is a flag, and a key of the config file.

  trl-rlsd train --config run.yaml --learning_rate 2e-6
  trl-rlsd train --config run.yaml --accelerate_config multi_gpu --num_processes 4
"""

_QUICKSTART_HELP = """\
Train a LoRA adapter on SmolLM2-135M-Instruct (or --model) to add and subtract, on the CPU, and measure it before and
after on problems that were held out. Adapter, metrics, pictures and summary are written.
"""

_REPORT_HELP = """\
Draw what a run has logged (metrics.jsonl, or the newest checkpoint's trainer_state.json) as one HTML page: reward,
length, entropy, clipping, KL, lambda, the teacher's share of the time, alarms, and the credit of some completions if
rlsd_log_credit_steps was set. Several runs are drawn over each other.

  trl-rlsd report quickstart-output
  trl-rlsd report out-grpo out-rlsd --html comparison.html
"""

_PUBLISH_HELP = """\
Publish an adapter or a model, in one commit that is read back: its files, tokenizer and a model card made from the
run. Nothing else of the folder is uploaded; keys, paths and teacher weights in those files are refused.
The token is that of `hf auth login`, or HF_TOKEN.

  trl-rlsd publish quickstart-output/adapter --repo-id me/my-adapter --base-model HuggingFaceTB/SmolLM2-135M-Instruct
"""

_COMPARE_HELP = """\
Train the same start on the same problems with several methods and seeds; one table, one picture, with intervals.

  trl-rlsd compare                                                the built-in task, on a CPU, in about 10 minutes
  trl-rlsd compare --config grpo.yaml --config rlsd.yaml --seeds 5          config files of `trl-rlsd train`

An interrupted comparison goes on where it was when the command is given again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # these parse the trainer's own fields, whose classes take seconds to import
    if argv and argv[0] in _OF_FIELDS:
        return _OF_FIELDS[argv[0]](argv[1:])
    parser, compare = _parser()
    known, rest = parser.parse_known_args(argv)
    options = vars(known)
    command = options.pop("command")
    if rest and not (command == "compare" and options["config"]):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if command == "compare":
        return _compare(compare, options, rest)
    return {"quickstart": _quickstart, "report": _report, "publish": _publish}[command](options)


def _parser() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of all commands, and that of `compare`."""
    raw: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(
        prog="trl-rlsd", usage="trl-rlsd COMMAND [options]", description=_HELP, epilog=_EXAMPLES, **raw
    )
    parser.add_argument("--version", action="version", version=f"trl-rlsd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog="trl-rlsd")
    for name in _OF_FIELDS:
        commands.add_parser(name, add_help=False)
    _add_quickstart_arguments(commands.add_parser("quickstart", description=_QUICKSTART_HELP, **raw))
    _add_report_arguments(commands.add_parser("report", description=_REPORT_HELP, **raw))
    _add_publish_arguments(commands.add_parser("publish", description=_PUBLISH_HELP, **raw))
    compare = commands.add_parser("compare", description=_COMPARE_HELP, **raw)
    _add_compare_arguments(compare)
    return parser, compare


def _add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name or path of any causal language model [SmolLM2-135M-Instruct]")
    parser.add_argument("--output-dir", default="quickstart-output", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps [%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of sampling, order and the adapter [%(default)s]")
    parser.add_argument("--credit", default="rlsd", help="credit function, e.g. grpo to compare [%(default)s]")


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output_dirs", nargs="+", metavar="OUTPUT_DIR", help="a run's output_dir; several overlay")
    parser.add_argument("--html", default="report.html", help="the page to write [%(default)s]")
    parser.add_argument("--smooth", type=int, help="optimizer steps of the running mean [a twentieth of the longest]")


def _add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="FOLDER", help="what `trainer.save_model` has written, or a run's output_dir"
    )
    parser.add_argument("--repo-id", required=True, help="owner/name; the repository is made if there is none")
    parser.add_argument("--base-model", help="id of the base on the Hub, where the run has loaded it from a folder")
    parser.add_argument("--private", action="store_true", default=None, help="refuse a repository that is public")
    parser.add_argument(
        "--dataset", help="the run's data, as `trl-rlsd train` takes it: no file may hold a text of it"
    )
    parser.add_argument("--license", help="of the model, for the card, e.g. apache-2.0")
    parser.add_argument("--revision", help="the branch, made if there is none [main]")
    parser.add_argument("--dry-run", action="store_true", help="check and list what would be uploaded; no network")


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    # no defaults here: what is not given is left to the functions, and what belongs to the other kind is told
    both = parser.add_argument_group("both")
    both.add_argument("--output-dir", default="compare-output", help="[%(default)s]")
    both.add_argument("--seeds", type=int, help="how many, from 1 on [3]")
    both.add_argument("--steps", type=int, help="optimizer steps of a run [80; a config's own]")
    both.add_argument("--every", type=int, help="steps between two measurements [10; 20]")
    both.add_argument("--held-out", type=int, help="problems that are measured on [256]")
    both.add_argument("--target", type=float, help="sampled accuracy that steps are counted to [0.5]")
    both.add_argument("--baseline", help="what ratios and differences are taken to [grpo; the first config]")
    own = parser.add_argument_group("your configs")
    own.add_argument(
        "--config",
        action="append",
        help="a config file; once for each method. What is not known here goes to `accelerate launch`",
    )
    task = parser.add_argument_group("the built-in task")
    task.add_argument(
        "--methods",
        type=lambda text: tuple(text.split(",")),
        help="with commas between: grpo,opsd,grpo_opsd,rlsd,rlsd_contrast,oracle [these], rlsd_gate, "
        "rlsd_shuffled, or any credit function",
    )
    task.add_argument("--chain-length", type=int, help="steps of a problem [4]")
    task.add_argument("--filler-share", type=float, help="share of filler letters [0.15]")
    task.add_argument("--side-computations", type=int, help="after each step, without effect on the answer [0]")
    task.add_argument("--hard-side-share", type=float, help="share of those that are drawn from the hard facts [0]")
    task.add_argument("--operands", type=int, help="second operands are the digits below this; 30 facts to each [10]")
    task.add_argument("--base-accuracy", type=float, help="about what the start reaches, sampled [0.33]")
    task.add_argument("--problems", type=int, help="problems a step [8]")
    task.add_argument("--generations", type=int, help="completions of a problem [8]")
    task.add_argument("--learning-rate", type=float, help="of the methods that have none of their own [3e-4]")
    task.add_argument("--split", choices=["validation", "test"], help="what is measured on [validation]")
    task.add_argument("--imports", nargs="+", help="modules that register credit functions of yours")
    task.add_argument("--jobs", type=int, help="runs at a time [one for each core, 4 at most]")


_TASK = ("chain_length", "filler_share", "side_computations", "hard_side_share", "operands", "base_accuracy")
_BUILTIN = (*_TASK, "methods", "problems", "generations", "learning_rate", "split", "imports", "jobs")


def _compare(parser: argparse.ArgumentParser, options: dict, rest: list[str]) -> int:
    options = {name: value for name, value in options.items() if value is not None}
    configs = options.pop("config", None)
    given = [name for name in _BUILTIN if name in options]
    if configs is not None and given:
        parser.error(f"--{given[0].replace('_', '-')} belongs to the built-in task; leave it, or leave --config.")
    if _missing("compare", ("matplotlib", "scipy", "yaml"), "lab"):
        return 2
    sys.path.insert(0, os.getcwd())  # where the user's modules are
    try:
        if configs is not None:
            from trl_rlsd.lab.configs import compare_configs

            print(compare_configs(options.pop("output_dir"), configs, **options, launch=rest))
        else:
            from trl_rlsd.lab.compare import compare_builtin
            from trl_rlsd.lab.task import ChainTask

            task = ChainTask(**{name: options.pop(name) for name in _TASK if name in options})
            print(compare_builtin(options.pop("output_dir"), task=task, **options))
    except (RuntimeError, ValueError) as error:
        print(f"trl-rlsd compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Finished runs are kept; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def _loading() -> AbstractContextManager:
    """While torch, transformers and TRL are imported, which takes seconds."""
    return _status("Loading libraries ...")


def _status(text: str) -> AbstractContextManager:
    """Says on a terminal what is going on."""
    from rich.console import Console

    return Console(stderr=True).status(text)


def _missing(command: str, modules: Sequence[str], extra: str) -> bool:
    """Tell which packages a command lacks."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        print(
            f"trl-rlsd {command}: not installed: {', '.join(missing)}. pip install 'trl-rlsd[{extra}]'",
            file=sys.stderr,
        )
    return bool(missing)


def _told(command: Callable[[Any], int]) -> Callable[[Any], int]:
    """A command whose mistakes are told in a line: they are the user's, and name field, value and fix."""

    @wraps(command)
    def run(given: Any) -> int:
        try:
            return command(given)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            print(f"trl-rlsd {command.__name__.removeprefix('_')}: {error}", file=sys.stderr)
            return 1

    return run


@_told
def _quickstart(options: dict) -> int:
    if _missing("quickstart", ("reasoning_gym", "matplotlib"), "quickstart"):
        return 2
    with _loading():
        from trl_rlsd.quickstart import run

    run(**options)
    return 0


@_told
def _report(options: dict) -> int:
    if _missing("report", ("plotly",), "report"):
        return 2
    with _loading():
        from trl_rlsd.report.run import run_report
    with _status("Drawing ..."):
        path = run_report(options["output_dirs"], options["html"], smooth=options["smooth"])
    print(f"Written: {path}")
    return 0


@_told
def _publish(options: dict) -> int:
    with _loading():
        from trl_rlsd.hub import publish

    dry_run, source = options.pop("dry_run"), options.pop("dataset")
    texts = _texts(source) if source else []
    print(publish(**options, private_texts=texts, dry_run=True), flush=True)
    if not dry_run:
        print(publish(**options, private_texts=texts))
    return 0


def _texts(source: str) -> list[str]:
    """All that stands in a dataset, as `trl-rlsd train` takes one by its name."""
    from trl_rlsd.hub.rows import texts_of
    from trl_rlsd.train import load_splits

    sys.path.insert(0, os.getcwd())  # where the user's modules are
    return [text for split in load_splits(source).values() for text in texts_of(split)]


@_told
def _inspect(argv: list[str]) -> int:
    with _loading():
        from trl_rlsd.inspection import main

    return main(argv)


def _doctor(argv: list[str]) -> int:
    with _loading():
        from trl_rlsd.doctor import doctor

    return doctor(argv)


def _train(argv: list[str]) -> int:
    """Hand the run to `accelerate launch`, as `trl grpo` does: what the parser does not know is the launcher's."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    from trl_rlsd.train import launcher_arguments, make_parser

    parser = make_parser(prog="trl-rlsd train", launches=True)
    parser.description = _TRAIN_HELP
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    *_, from_file, from_flags = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    launch = launcher_arguments(from_file + from_flags)
    script = _without(argv, from_flags)
    try:
        launch_command(launch_command_parser().parse_args([*launch, "--module", "trl_rlsd.train", *script]))
    except CalledProcessError as error:  # the run has said why
        return error.returncode
    return 0


def _without(arguments: list[str], remove: list[str]) -> list[str]:
    """The arguments less an ordered part of them."""
    kept, rest = [], list(remove)
    for argument in arguments:
        if rest and argument == rest[0]:
            rest.pop(0)
        else:
            kept.append(argument)
    return kept


_OF_FIELDS = {"train": _train, "inspect": _inspect, "doctor": _doctor}


if __name__ == "__main__":
    raise SystemExit(main())
