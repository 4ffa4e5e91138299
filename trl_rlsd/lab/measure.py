"""Measuring a policy while it trains: sampled and greedy accuracy on held-out problems, at fixed steps.

trainer -> one line per measurement in a file -> the curve of a run
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from trl_rlsd.files import write_whole
from trl_rlsd.trainer import RLSDTrainer


# measurement -> what the trainer logs it as, in evaluation
_LOGGED = {
    "length": "eval_completions/mean_length",
    "entropy": "eval_entropy",
    "leak": "eval_rlsd/leak_cites",
}
_SEED = 20_260_403  # the same draws for every method and step


class MeasureCallback(TrainerCallback):
    """Measures before training, every `every` steps, and after the last; needs its `trainer` set.

    A run that is resumed from a checkpoint keeps the measurements up to that step.

    Args:
        path: file that gets a JSON line per measurement.
        every: optimizer steps between two measurements.
    """

    def __init__(self, path: Path, every: int):
        self.path, self.every = path, every
        self.trainer: RLSDTrainer | None = None
        self.curve: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.curve = [point for point in read_curve(self.path) if point["step"] <= state.global_step]
        if state.global_step == 0:
            self.curve = []
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if (step % self.every and step != state.max_steps) or any(point["step"] == step for point in self.curve):
            return
        orders = dict(vars(control))
        self.curve.append({"step": step, **measure(self.trainer)})
        vars(control).update(orders)  # an evaluation's own log takes back the order to log this step
        if state.is_world_process_zero:
            write_whole(self.path, "".join(json.dumps(point) + "\n" for point in self.curve))


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The measurements in a file, none where there is none; a last line that was cut off is left out."""
    points = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            points.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return points


def measure(trainer: RLSDTrainer) -> dict[str, float | None]:
    """`sampled` and `greedy`: the share of completions of the evaluation set with a total reward of at least
    `contrast_reward_below`; `length` in tokens, `entropy` in nats and `leak` (citing phrases) of the sampled ones.

    Greedy decoding goes through transformers; with vLLM `greedy` is None. Training goes on as if nothing had been
    measured: torch's random state is put back (not that of vLLM, nor of Python within a reward), and the model into
    train mode.

    Raises: ValueError, where no reward could judge a completion.
    """
    try:
        with _fixed_draws(trainer.accelerator.device):
            logged = _evaluated(trainer)
        values = {name: logged.get(key) for name, key in _LOGGED.items()}
        greedy = None
        if not trainer.args.use_vllm:
            with _fixed_draws(trainer.accelerator.device), _greedy(trainer.generation_config):
                greedy = _evaluated(trainer)["eval_rlsd/right"]
    finally:
        # TRL's log() tells training from evaluation by the model's mode
        trainer.model.train()
    return {"sampled": logged["eval_rlsd/right"], "greedy": greedy, **values}


def _evaluated(trainer: RLSDTrainer) -> dict[str, float]:
    trainer.evaluate()
    logged = trainer.state.log_history.pop()
    if "eval_rlsd/right" not in logged:
        raise ValueError(
            f"No reward ({', '.join(trainer.reward_func_names)}) could judge any held-out completion, so there is no "
            "accuracy. Check that the test split has the columns that the rewards read."
        )
    return logged


@contextmanager
def _fixed_draws(device: torch.device) -> Iterator[None]:
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(_SEED)
        yield


@contextmanager
def _greedy(generation_config) -> Iterator[None]:
    before = generation_config.do_sample
    generation_config.do_sample = False
    try:
        yield
    finally:
        generation_config.do_sample = before
