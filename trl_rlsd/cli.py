"""`trl-rlsd train` and `trl-rlsd quickstart`; `python -m trl_rlsd` is the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from trl_rlsd import __version__


_TRAIN_HELP = """\
Train with RLSD. Every field of RLSDConfig and of TRL's ModelConfig is a flag, and a key of the config file.

  trl-rlsd train --config run.yaml --learning_rate 2e-6
  trl-rlsd train --config run.yaml --accelerate_config multi_gpu --num_processes 4
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
    if argv[:1] == ["train"]:
        return _train(argv[1:])
    options = vars(parser.parse_args(argv))
    options.pop("command")
    from trl_rlsd.quickstart import run

    run(**options)
    return 0


def _add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name or path of any causal language model [SmolLM2-135M-Instruct]")
    parser.add_argument("--output-dir", default="quickstart-output", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps [%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of sampling, order and the adapter [%(default)s]")
    parser.add_argument("--credit", default="rlsd", help="credit function, e.g. grpo to compare [%(default)s]")


def _train(argv: list[str]) -> int:
    """Hand the run to `accelerate launch`, as `trl grpo` does: what the parser does not know is the launcher's."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    from trl_rlsd.train import launcher_arguments, make_parser

    parser = make_parser(prog="trl-rlsd train")
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
