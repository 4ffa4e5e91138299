"""`trl-rlsd inspect`: which tokens get the credit, before anything is trained.

    a prompt, a privileged context, completions     -> each of them, as if right and as if wrong
    a config file of `trl-rlsd train`               -> completions of its first rows, sampled and rewarded here

Both go through RLSDTrainer: prompts, scoring and credit are those of training.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
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
        if look.prompt is None:
            pictures = of_rows(script, args, model, rows=look.rows, per_row=look.per_row)
        else:
            pictures = of_completions(args, model, look.prompt, look.context, look.completion, look.verdict)
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


def of_rows(
    script: RLSDScriptArguments, args: RLSDConfig, model: ModelConfig, *, rows: int, per_row: int
) -> CreditPictures:
    """Completions of the dataset's first rows, sampled and rewarded here: of each row the best, the worst, and so on
    to `per_row`."""
    trainer = build_trainer(script, args, model, evaluates=False)
    pictures = CreditPictures()
    for row in tqdm(list(islice(trainer.train_dataset, rows)), desc="sampling", unit="row"):
        ranked = sorted(trainer.credit_pictures([row]), key=lambda one: -one.advantage)
        from_both_ends = [ranked[index // 2 if index % 2 == 0 else -1 - index // 2] for index in range(len(ranked))]
        pictures += from_both_ends[:per_row]
    return pictures


def of_completions(
    args: RLSDConfig, model: ModelConfig, prompt: str, context: str | None, completions: list[str] | None, verdict: str
) -> CreditPictures:
    """Given completions, as if they had been right, and as if wrong. `args` has groups of two, unscaled rewards.

    Raises: ValueError, where context or completion is missing.
    """
    for name, value in (("context", context), ("completion", completions)):
        if not value:
            raise ValueError(
                f"--prompt needs --{name} too. To sample completions, give a dataset instead of a prompt."
            )
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, trust_remote_code=args.trust_remote_code)
    plain = tokenizer.chat_template is None
    row = {
        "prompt": prompt if plain else [{"role": "user", "content": prompt}],
        args.privileged_column: context,
    }
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in completions]
    args.max_completion_length = max(map(len, ids))
    left = iter(ids)

    def given(prompts, trainer):
        own = [next(left)] * len(prompts)
        return {"prompt_ids": trainer.prompt_ids(prompts), "completion_ids": own, "logprobs": None}

    def as_if(completions, **columns):
        return [1.0, -1.0]

    trainer = RLSDTrainer(
        model=model.model_name_or_path,
        reward_funcs=as_if,
        args=args,
        train_dataset=Dataset.from_list([row]),
        rollout_func=given,
        **model_arguments(args, model),
    )
    signs = {"right": (1,), "wrong": (-1,), "both": (1, -1)}[verdict]
    pictures = trainer.credit_pictures([row] * len(completions))
    return CreditPictures(one for one in pictures if any(one.advantage * sign > 0 for sign in signs))
