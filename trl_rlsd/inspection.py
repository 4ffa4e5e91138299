"""`trl-rlsd inspect`: which tokens get the credit, before anything is trained.

    a prompt, a privileged context, completions     -> each of them, as if right and as if wrong
    a config file of `trl-rlsd train`               -> completions of its first rows, sampled and rewarded here

Both go through RLSDTrainer: prompts, scoring and credit are those of training.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from trl import ModelConfig

from trl_rlsd.config import RLSDConfig
from trl_rlsd.report.page import CreditPictures
from trl_rlsd.report.terminal import rendered
from trl_rlsd.train import RLSDScriptArguments, build_trainer, launcher_arguments, make_parser, model_arguments
from trl_rlsd.trainer import RLSDTrainer


@dataclass
class InspectArguments:
    """What `trl-rlsd inspect` asks for besides the fields of `trl-rlsd train`."""

    prompt: str | None = field(default=None, metadata={"help": "A prompt of your own, instead of a dataset's rows."})
    context: str | None = field(default=None, metadata={"help": "With `prompt`: what only the teacher reads."})
    completion: list[str] | None = field(
        default=None, metadata={"help": "With `prompt`: completions whose tokens are looked at, one or several."}
    )
    verdict: str = field(
        default="both",
        metadata={
            "help": "With `prompt`: whether the completions are looked at as right (A = 1), wrong (A = -1), or both.",
            "choices": ["right", "wrong", "both"],
        },
    )
    rows: int = field(default=2, metadata={"help": "How many rows of the dataset."})
    per_row: int = field(
        default=2, metadata={"help": "How many of a row's completions are shown: the best, the worst, the next best."}
    )
    html: str = field(default="credit.html", metadata={"help": "The page to write."})
    show_prompts: bool = field(default=False, metadata={"help": "Print the prompts in the terminal, too."})


def main(argv: Sequence[str]) -> int:
    """Parse, look, print and write the page."""
    sys.path.insert(0, os.getcwd())  # dotted paths may name modules beside the config
    # TRL 1.16 beside transformers 5.23: deprecations that a reader can do nothing about
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is how given completions come in
    with TemporaryDirectory() as scratch:
        script, args, model, look, rest = _parse(list(argv), scratch)
        launcher_arguments(rest)
        adapter = model.model_name_or_path if _is_adapter(model.model_name_or_path) else None
        build = partial(_trainer, script, args, model, adapter)
        if look.prompt is None:
            pictures = of_rows(build, rows=look.rows, per_row=look.per_row)
        else:
            given = look.prompt, look.context, look.completion
            pictures = of_completions(build, args, model, *given, verdict=look.verdict)
    if all(one.advantage == 0 for one in pictures):
        Console().print("All rewards of a row are equal, so that there is no credit to give: try other rows.")
    Console().print(rendered(pictures, prompts=look.show_prompts))
    path = pictures.save(look.html, f"Token credit: {model.model_name_or_path}")
    Console().print(f"The page, with prompts and all values: {path}", markup=False, highlight=False)
    return 0


def _parse(argv: list[str], scratch: str) -> tuple:
    """The arguments, with what belongs to a run and its machines replaced: this is one process, and saves nothing."""
    known = make_parser(launches=True, more=(InspectArguments,)).parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )[0]
    group = known.num_generations if known.prompt is None else 2  # once right, once wrong
    here = {
        "output_dir": scratch,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "push_to_hub": "false",
        "use_vllm": "false",
        "use_liger_loss": "false",  # it takes its gradients in the forward
        "rlsd_lambda_warmup_steps": "0",  # credit as it is at lambda's peak
        "num_generations": str(group),
        "per_device_train_batch_size": str(group),
        "gradient_accumulation_steps": "1",
        "disable_dropout": "true",
    } | ({} if known.prompt is None else {"scale_rewards": "none"})
    if not torch.accelerator.is_available():  # a recipe for a GPU can be looked at on a laptop
        here |= {"use_cpu": "true", "bf16": "false", "fp16": "false"}
    flags = [part for name, value in here.items() for part in (f"--{name}", value)]
    parser = make_parser(prog="trl-rlsd inspect", more=(InspectArguments,))
    parser.description = __doc__
    return parser.parse_args_and_config([*argv, *flags], return_remaining_strings=True)


def _is_adapter(path: str | None) -> bool:
    return bool(path) and os.path.isfile(os.path.join(path, "adapter_config.json"))


def _trainer(
    script: RLSDScriptArguments, args: RLSDConfig, model: ModelConfig, adapter: str | None, **own
) -> RLSDTrainer:
    """The trainer of a config, or with `own` arguments in the place of its data and rewards; a folder with an adapter
    stands for its base with that adapter."""
    config = None
    if adapter is not None:
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode, model.model_name_or_path = False, config.base_model_name_or_path
    if own:
        trainer = RLSDTrainer(
            model=model.model_name_or_path,
            args=args,
            teacher_model=script.teacher_model_name_or_path,
            **model_arguments(args, model, config),
            **own,
        )
    else:
        trainer = build_trainer(script, args, model, evaluates=False, peft_config=config)
    if adapter is not None:
        set_peft_model_state_dict(trainer.model, load_peft_weights(adapter, device="cpu"))
        if trainer.teacher is not None:
            trainer.teacher.start(0)  # its copy is of the adapter as it was made
    return trainer


def of_rows(build: Callable[..., RLSDTrainer], *, rows: int, per_row: int) -> CreditPictures:
    """Completions of the dataset's first rows, sampled and rewarded here: of each row the best, the worst, and so on
    to `per_row`."""
    trainer = build()
    pictures = CreditPictures()
    for row in tqdm(list(islice(trainer.train_dataset, rows)), desc="sampling", unit="row"):
        ranked = sorted(trainer.credit_pictures([row]), key=lambda one: -one.advantage)
        from_both_ends = [ranked[index // 2 if index % 2 == 0 else -1 - index // 2] for index in range(len(ranked))]
        pictures += from_both_ends[:per_row]
    return pictures


def of_completions(
    build: Callable[..., RLSDTrainer],
    args: RLSDConfig,
    model: ModelConfig,
    prompt: str,
    context: str | None,
    completions: list[str] | None,
    *,
    verdict: str,
) -> CreditPictures:
    """Given completions, as if they had been right, and as if wrong. `args` has groups of two, unscaled rewards.

    Raises: ValueError, where context or completion is missing.
    """
    for name, value in (("context", context), ("completion", completions)):
        if not value:
            raise ValueError(
                f"--prompt needs --{name} too. To sample completions, give a dataset instead of a prompt."
            )
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=args.trust_remote_code
    )
    row = {
        "prompt": prompt if tokenizer.chat_template is None else [{"role": "user", "content": prompt}],
        args.privileged_column: context,
    }
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in completions]
    args.max_completion_length = max(map(len, ids))
    args.reward_weights = None  # of the config's rewards
    left = iter(ids)

    def given(prompts, trainer):
        own = [next(left)] * len(prompts)
        return {"prompt_ids": trainer.prompt_ids(prompts), "completion_ids": own, "logprobs": None}

    def as_if(completions, **columns):
        return [1.0, -1.0]

    trainer = build(reward_funcs=as_if, train_dataset=Dataset.from_list([row]), rollout_func=given)
    signs = {"right": (1,), "wrong": (-1,), "both": (1, -1)}[verdict]
    pictures = trainer.credit_pictures([row] * len(completions))
    return CreditPictures(one for one in pictures if any(one.advantage * sign > 0 for sign in signs))
