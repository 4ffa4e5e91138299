"""The training script behind `trl-rlsd train`: a config file and flags in, a trained model out.

`accelerate launch -m trl_rlsd.train --config FILE` is the same.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, IterableDataset, load_dataset
from peft import PeftConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from trl_rlsd.config import RLSDConfig
from trl_rlsd.data.curriculum import Curriculum, Stage
from trl_rlsd.data.load import FORMATS, GYM, load_rows, read_source
from trl_rlsd.data.presets import presets_for
from trl_rlsd.data.privileged import Documents
from trl_rlsd.dotted import find
from trl_rlsd.dotted import load as load_callable
from trl_rlsd.rewards import REWARDS, get_reward


if TYPE_CHECKING:
    from trl_rlsd.trainer import RLSDTrainer

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass
class RLSDScriptArguments(ScriptArguments):
    """What a run needs besides the trainer's and the model's own fields."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "The data: a dataset on the Hub, a .json, .jsonl, .parquet or .csv file (wildcards work), the "
            "dotted path of a Python function that returns a dataset or a dictionary of splits, or 'reasoning_gym:' "
            "and the name of one of its datasets."
        },
    )
    dataset_options: dict | str | None = field(
        default=None,
        metadata={
            "help": "Options of trl_rlsd.data.load.load_rows, which makes rows of datasets as they are: preset, "
            "columns, privileged, documents, ... On the command line as JSON. Datasets of the Hub that a preset knows "
            "need none."
        },
    )
    curriculum: dict | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of trl_rlsd.data.curriculum.Curriculum, such as {column: pass_rate, stages: "
            "[{at_least: 0.5, until: 0.8}, {}]}; on the command line as JSON."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Rewards, summed: registered names ({', '.join(REWARDS)}) or dotted paths such as "
            "'my_package.rewards.my_reward'."
        },
    )
    reward_options: dict | str | None = field(
        default=None,
        metadata={
            "help": "Options of rewards by their names, such as {math_reward: {timeout: 10}}; on the command line as "
            "JSON."
        },
    )
    tools: list[str] | None = field(
        default=None,
        metadata={"help": "Functions that the model may call, as TRL's `tools`: dotted paths."},
    )
    environment_factory: dict | str | None = field(
        default=None,
        metadata={
            "help": "An environment class or a function that makes one, as TRL's `environment_factory`: its dotted "
            "path, or names and paths for a dataset with a column 'environment'; on the command line as JSON then."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model of teacher_model_kind='external'."}
    )

    def __post_init__(self):
        for name in ("dataset_options", "curriculum", "reward_options", "environment_factory"):
            value = getattr(self, name)
            is_path = name == "environment_factory" and not str(value).startswith("{")
            if isinstance(value, str) and not is_path:
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name}={value!r} is not JSON: {error}.") from error
            if not is_path and not isinstance(getattr(self, name), dict | None):
                raise ValueError(f"{name}={value!r} must map names to values, such as {{name: value}}.")


class _LaunchParser(TrlParser):
    """Parses, but makes no config of it: what a config checks may hold only among the processes that are launched."""

    def parse_args_into_dataclasses(self, args=None, return_remaining_strings=False, **kwargs):
        return self.parse_known_args(args=args)


def make_parser(prog: str | None = None, *, launches: bool = False, more: tuple[type, ...] = ()) -> TrlParser:
    """The parser of every field of the script, of RLSDConfig, of TRL's ModelConfig and of `more` dataclasses; with
    `launches`, one that tells fields from the launcher's arguments, and nothing more."""
    kind = _LaunchParser if launches else TrlParser
    return kind((RLSDScriptArguments, RLSDConfig, ModelConfig, *more), prog=prog)


def launcher_arguments(rest: list[str]) -> list[str]:
    """What the parser does not know, as arguments of `accelerate launch`: `--accelerate_config` is a file or the name
    of one that TRL ships. Exits with the launcher's own message where it does not know an argument either."""
    arguments = resolve_accelerate_config_argument(rest)
    launch_command_parser().parse_args([*arguments, "script"])
    return arguments


def load_splits(name: str | None, config: str | None = None, streaming: bool = False) -> dict:
    """Splits by name, from the Hub, files, or a function; see `RLSDScriptArguments.dataset_name`.

    Raises:
        ValueError: nothing is there under this name; the message says what was tried.
    """
    if not name:
        raise ValueError("dataset_name is not set. Give a Hub dataset, a file, or the dotted path of a function.")
    suffix = Path(name).suffix.lower()
    if suffix in FORMATS:
        if streaming:
            return load_dataset(FORMATS[suffix], data_files=name, streaming=True)
        return {"train": read_source(name, "train")}
    if _DOTTED.fullmatch(name):
        try:
            splits = find(name)()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"dataset_name={name!r} was read as the dotted path of a function: {error}.") from error
        if isinstance(splits, Dataset | IterableDataset):
            return {"train": splits}
        if not isinstance(splits, dict):
            raise TypeError(f"dataset_name={name!r} returned {type(splits).__name__}, not a dataset or a dictionary.")
        return splits
    return load_dataset(name, name=config, streaming=streaming)


def rows_of(
    script: RLSDScriptArguments,
    model: ModelConfig,
    field_name: str = "dataset_train_split",
    load: Callable[[], dict] | None = None,
) -> Dataset | IterableDataset:
    """The rows of a split, made by `load_rows` where there are options or a preset knows them; `load` gives all splits
    of a source that `load_rows` does not read itself.

    Raises: ValueError, TypeError, naming the field.
    """
    load = load or partial(load_splits, script.dataset_name, script.dataset_config, script.dataset_streaming)
    source, name = script.dataset_name, getattr(script, field_name)
    options: Any = script.dataset_options  # JSON text was read in __post_init__
    ready = options is None and not (source and (source.startswith(GYM) or presets_for(source)))
    is_file = source and Path(source).suffix.lower() in FORMATS
    if ready or (source and _DOTTED.fullmatch(source) and not is_file):
        splits = load()
        if name not in splits:
            raise ValueError(f"{field_name}={name!r} is not a split of the dataset; it has {', '.join(splits)}.")
        if ready:
            return splits[name]
        source = splits[name]
    if script.dataset_streaming:
        raise ValueError("dataset_streaming=True: load_rows reads all rows. Leave it out, or give ready rows.")
    options = dict(options or {})
    if isinstance(options.get("documents"), dict):
        documents = options["documents"]
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path) if documents.get("budget") else None
        options["documents"] = Documents(**documents, tokenizer=tokenizer)
    return load_rows(source, split=name, config=script.dataset_config, **options)


def main(argv: list[str] | None = None) -> None:
    """Parse, train, save; push to the Hub if asked to."""
    sys.path.insert(0, os.getcwd())  # dotted paths may name modules beside the config
    script, args, model, rest = make_parser().parse_args_and_config(argv, return_remaining_strings=True)
    launcher_arguments(rest)  # the launcher has taken these by now; anything else is a mistake
    trainer = build_trainer(script, args, model, evaluates=args.eval_strategy != "no")
    resume = args.resume_from_checkpoint
    # a flag's value is text: true takes the newest whole checkpoint of output_dir, false none
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(resume).lower(), resume))
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.accelerator.print(trainer.push_to_hub())
    trainer.end()


def build_trainer(
    script: RLSDScriptArguments,
    args: RLSDConfig,
    model: ModelConfig,
    *,
    evaluates: bool,
    evaluation_rows: int | None = None,
    callbacks: list[TrainerCallback] | None = None,
    peft_config: PeftConfig | None = None,
) -> RLSDTrainer:
    """The trainer that a config file describes.

    Args:
        evaluates: whether it needs the test split; `evaluation_rows` takes that many of its first rows.
        peft_config: in the place of the one that the fields describe.

    Raises: ValueError, naming the field.
    """
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is not set. Give a model's path or its id on the Hub.")
    rewards = rewards_of(script)
    # once for both: a function of the user's may take its time, and need not return the same twice
    load = cache(lambda: load_splits(script.dataset_name, script.dataset_config, script.dataset_streaming))
    train_dataset = rows_of(script, model, load=load)
    eval_dataset = rows_of(script, model, "dataset_test_split", load) if evaluates else None
    if evaluation_rows is not None:
        eval_dataset = eval_dataset.take(evaluation_rows)

    from trl_rlsd.trainer import RLSDTrainer

    trainer = RLSDTrainer(
        model=model.model_name_or_path,
        reward_funcs=rewards,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        **model_arguments(args, model, peft_config),
        teacher_model=script.teacher_model_name_or_path,
        **_tools(script),
        callbacks=[*(callbacks or []), *([_curriculum(script.curriculum)] if script.curriculum else [])],
    )
    is_own = Path(script.dataset_name or "").suffix.lower() in FORMATS or _DOTTED.fullmatch(script.dataset_name or "")
    trainer.dataset_name = None if is_own else script.dataset_name
    return trainer


def rewards_of(script: RLSDScriptArguments) -> list[Callable]:
    """The rewards by their names and options. Raises: ValueError, naming the field."""
    names = script.reward_funcs or []
    options: Any = script.reward_options or {}  # JSON text was read in __post_init__
    if not names and not script.environment_factory:  # which may have a reward of its own
        raise ValueError(f"reward_funcs is not set. Give one or more of {', '.join(REWARDS)}, or dotted paths.")
    if unused := [name for name in options if name not in names]:
        raise ValueError(f"reward_options names {unused[0]!r}, which is not in reward_funcs.")
    return [get_reward(name, options.get(name)) for name in names]


def model_arguments(args: RLSDConfig, model: ModelConfig, peft_config: PeftConfig | None = None) -> dict[str, Any]:
    """What TRL's ModelConfig says, as arguments of the trainer; how the model is loaded goes into `args`."""
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    peft_config = peft_config or get_peft_config(model)
    return {"quantization_config": get_quantization_config(model), "peft_config": peft_config}


def _tools(script: RLSDScriptArguments) -> dict:
    """What the model may call, as arguments of the trainer."""

    def found(field_name: str, path: str) -> Callable:
        return load_callable(field_name, path, "None", "or class as TRL takes it")

    given = script.environment_factory or None
    environments: Callable | dict[str, Callable] | None
    if isinstance(given, dict):
        environments = {name: found("environment_factory", path) for name, path in given.items()}
    else:
        environments = found("environment_factory", given) if given else None
    return {"tools": [found("tools", path) for path in script.tools or []], "environment_factory": environments}


def _curriculum(given: Any) -> Curriculum:
    try:
        stages = [Stage(**stage) for stage in given.get("stages", [])]
        return Curriculum(**{**given, "stages": stages})
    except TypeError as error:
        raise ValueError(f"curriculum={given!r}: {error}. See trl_rlsd.data.curriculum.") from error


if __name__ == "__main__":
    main()
