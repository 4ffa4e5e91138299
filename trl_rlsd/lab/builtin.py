"""One run on the built-in task: a method by name, a seed, and a result that is written whole."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback

from trl_rlsd import __version__
from trl_rlsd.config import RLSDConfig
from trl_rlsd.credit import get_credit
from trl_rlsd.lab import credit  # noqa: F401  registers the oracle and the control
from trl_rlsd.lab.measure import MeasureCallback
from trl_rlsd.lab.start import source_hash, start_key
from trl_rlsd.lab.task import CITE, MOST_HELD_OUT, TEMPLATE, ChainTask, chain_reward
from trl_rlsd.lab.trainer import LabTrainer


# name -> config fields. The paper's settings where it has any; learning rates for 64 completions of about 30 tokens.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"credit": "grpo"},
    "opsd": {"credit": "opsd", "learning_rate": 1e-4},
    "grpo_opsd": {"credit": "grpo_opsd", "rlsd_lambda": 1.0, "rlsd_lambda_decay_steps": 0},
    "rlsd": {"credit": "rlsd"},
    "rlsd_contrast": {"credit": "rlsd_contrast"},
    "rlsd_gate": {
        "credit": "rlsd_gate",
        "rlsd_lambda": 0.9,
        "rlsd_lambda_decay_steps": 0,
        "contrast_fallback": "one_sided",
    },
    "oracle": {"credit": "oracle", "rlsd_lambda": 0.9, "rlsd_lambda_decay_steps": 0},
    "rlsd_shuffled": {"credit": "rlsd_shuffled"},
}
DEFAULT_METHODS = ("grpo", "opsd", "grpo_opsd", "rlsd", "rlsd_contrast", "oracle")
TRAIN_PROBLEMS = 4096


def method_fields(method: str) -> dict[str, Any]:
    """The config fields of a method: one of `METHODS`, or any registered credit function with its defaults.

    Raises: ValueError, listing the names there are.
    """
    if method in METHODS:
        return METHODS[method]
    return {"credit": get_credit(method).name}


def builtin_settings(
    method: str,
    task: ChainTask,
    *,
    steps: int = 80,
    every: int = 10,
    problems: int = 8,
    generations: int = 8,
    learning_rate: float = 3e-4,
    split: str = "validation",
    held_out: int = 256,
    imports: Sequence[str] = (),
    pretraining_steps: int = 4000,
    **fields: Any,
) -> dict[str, Any]:
    """What determines a run but its seed, as JSON: the options, and hashes of the start and of the credit function.

    Args:
        method: see `method_fields`.
        every: steps between two measurements, on the first `held_out` problems of the `split`.
        problems, generations: problems a step, and completions of each.
        learning_rate: of a method that has none of its own.
        imports: modules that register further credit functions.
        fields: of `RLSDConfig`, over the method's.

    Raises: ValueError, for an unknown method, or more held-out problems than the splits keep apart.
    """
    if held_out > MOST_HELD_OUT:
        raise ValueError(f"held_out={held_out} is out of range; it must be at most {MOST_HELD_OUT}.")
    for module in imports:
        import_module(module)
    own = method_fields(method)
    return {
        "method": method,
        "version": __version__,
        "start": start_key(task, pretraining_steps),
        "credit_code": source_hash(get_credit(own["credit"]).function),
        "imports": list(imports),
        "task": asdict(task),
        "every": every,
        "split": split,
        "held_out": held_out,
        "config": {
            "max_steps": steps,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": problems * generations,
            "num_generations": generations,
            **own,
            **fields,
        },
    }


def run_builtin(settings: dict[str, Any], start: str, seed: int, folder: str) -> dict[str, Any]:
    """Train and measure; what is printed meanwhile goes to `log.txt` in the folder."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # runs stand side by side, one on each core
    try:
        with (path / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                return _run(settings, start, seed, path)
            except Exception:
                traceback.print_exc()
                raise
    finally:
        torch.set_num_threads(threads)


def _run(settings: dict[str, Any], start: str, seed: int, path: Path) -> dict[str, Any]:
    for module in settings["imports"]:
        import_module(module)
    task = ChainTask(**settings["task"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    args = RLSDConfig(
        str(path),
        seed=seed,
        max_completion_length=task.max_completion_length,
        lr_scheduler_type="constant",
        teacher_prompt_template=TEMPLATE,
        contrast_reference="trl_rlsd.lab.task.results_of",
        leak_phrases=[CITE],
        alarm_steps=0,
        per_device_eval_batch_size=settings["held_out"],
        num_generations_eval=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        **settings["config"],
    )
    measuring = MeasureCallback(path / "curve.jsonl", settings["every"])
    trainer = LabTrainer(
        LlamaForCausalLM.from_pretrained(start),
        chain_reward,
        args,
        with_other(task.problems(TRAIN_PROBLEMS, "train"), args.contrast_column),
        with_other(task.problems(settings["held_out"], settings["split"]), args.contrast_column),
        processing_class=tokenizer,
        callbacks=[measuring],
    )
    measuring.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {
        "method": settings["method"],
        "seed": seed,
        "steps": trainer.state.global_step,
        "curve": measuring.curve,
        **trained(trainer.state.log_history),
        "localisation": trainer.localisation.result(),
        "settings": settings,
    }


def with_other(problems: Dataset, column: str | None) -> Dataset:
    """With the reference of the problem before, as a wrong one, in a column of that name."""
    if column is None:
        return problems
    references = list(problems["privileged_context"])
    return problems.add_column(column, references[-1:] + references[:-1])


def trained(history: list[dict[str, float]]) -> dict[str, Any]:
    """What the logs of training say: seconds of each step, the reward, and the `rlsd/*` metrics on the mean."""
    logs = [log for log in history if "step_time" in log]
    names = sorted({name for log in logs for name in log if name.startswith("rlsd/")})
    return {
        "step_seconds": [log["step_time"] for log in logs],
        # not in a step that takes its completions from an earlier one
        "rewards": [log["reward"] for log in logs if log.get("reward") is not None],
        "metrics": {name: median(log[name] for log in logs if name in log) for name in names},
    }
