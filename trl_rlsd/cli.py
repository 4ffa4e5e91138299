"""`trl-rlsd train | quickstart | compare`; `python -m trl_rlsd` is the same."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from trl_rlsd import __version__


_TRAIN_HELP = """\
Train with RLSD. Every field of RLSDConfig and of TRL's ModelConfig is a flag, and a key of the config file.

  trl-rlsd train --config run.yaml --learning_rate 2e-6
  trl-rlsd train --config run.yaml --accelerate_config multi_gpu --num_processes 4
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
    parser = argparse.ArgumentParser(prog="trl-rlsd", description="RLSD for TRL.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"trl-rlsd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train a model from a config file and flags", add_help=False)
    quickstart = commands.add_parser("quickstart", help="a small real run on the CPU, from nothing to an adapter")
    _add_quickstart_arguments(quickstart)
    compare = commands.add_parser(
        "compare",
        help="methods and seeds side by side, on a built-in task or on your configs",
        description=_COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_compare_arguments(compare)
    if argv[:1] == ["train"]:
        return _train(argv[1:])
    if argv[:1] == ["inspect"]:
        return _told("inspect", lambda: _inspect(argv[1:]))
    options, rest = parser.parse_known_args(argv)
    options = vars(options)
    command = options.pop("command")
    if rest and not (command == "compare" and options["config"]):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if command == "compare":
        return _compare(compare, options, rest)
    from trl_rlsd.quickstart import run

    run(**options)
    return 0


def _add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name or path of any causal language model [SmolLM2-135M-Instruct]")
    parser.add_argument("--output-dir", default="quickstart-output", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps [%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of sampling, order and the adapter [%(default)s]")
    parser.add_argument("--credit", default="rlsd", help="credit function, e.g. grpo to compare [%(default)s]")


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
        help="with commas between: grpo,opsd,grpo_opsd,rlsd,rlsd_contrast,oracle [these], rlsd_shuffled, "
        "or any credit function",
    )
    task.add_argument("--chain-length", type=int, help="steps of a problem [4]")
    task.add_argument("--filler-share", type=float, help="share of filler letters [0.15]")
    task.add_argument("--side-computations", type=int, help="after each step, without effect on the answer [0]")
    task.add_argument("--hard-side-share", type=float, help="share of those that are drawn from the hard facts [0]")
    task.add_argument("--base-accuracy", type=float, help="about what the start reaches, sampled [0.33]")
    task.add_argument("--problems", type=int, help="problems a step [8]")
    task.add_argument("--generations", type=int, help="completions of a problem [8]")
    task.add_argument("--learning-rate", type=float, help="of the methods that have none of their own [3e-4]")
    task.add_argument("--split", choices=["validation", "test"], help="what is measured on [validation]")
    task.add_argument("--imports", nargs="+", help="modules that register credit functions of yours")
    task.add_argument("--jobs", type=int, help="runs at a time [one for each core, 4 at most]")


_TASK = ("chain_length", "filler_share", "side_computations", "hard_side_share", "base_accuracy")
_BUILTIN = (*_TASK, "methods", "problems", "generations", "learning_rate", "split", "imports", "jobs")


def _compare(parser: argparse.ArgumentParser, options: dict, rest: list[str]) -> int:
    options = {name: value for name, value in options.items() if value is not None}
    configs = options.pop("config", None)
    given = [name for name in _BUILTIN if name in options]
    if configs is not None and given:
        parser.error(f"--{given[0].replace('_', '-')} belongs to the built-in task; leave it, or leave --config.")
    if missing := [name for name in ("matplotlib", "scipy", "yaml") if find_spec(name) is None]:
        parser.error(f"{', '.join(missing)} is not installed: pip install 'trl-rlsd[lab]'")
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


def _told(command: str, run: Callable[[], int]) -> int:
    """A command whose mistakes are told in a line: they are the user's, and name field, value and fix."""
    try:
        return run()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"trl-rlsd {command}: {error}", file=sys.stderr)
        return 1


def _inspect(argv: list[str]) -> int:
    from trl_rlsd.inspection import main

    return main(argv)


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
    launch_command(launch_command_parser().parse_args([*launch, "--module", "trl_rlsd.train", *script]))
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


if __name__ == "__main__":
    raise SystemExit(main())
