"""Completions that are still to be used when a checkpoint is written, so that a resumed run equals the uninterrupted
one. TRL 1.16 forgets them, and its place among them: it would generate anew."""

from __future__ import annotations

import os
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from trl import GRPOConfig


logger = get_logger(__name__)


def rollouts_file(folder: str, process_index: int) -> str:
    """Every process has its own completions."""
    return os.path.join(folder, f"rlsd_rollouts_{process_index}.pt")


def save_rollouts(path: str, step: int, batches: list[dict[str, Any]], processes: int) -> None:
    """Write the batches of the last generation and how many micro-batches had been trained on in all (`step`)."""
    os.makedirs(os.path.dirname(path), exist_ok=True)  # ranks other than the first may be here before it is made
    torch.save({"step": step, "processes": processes, "batches": batches}, path)


def load_rollouts(
    path: str, processes: int, steps_per_generation: int, device: torch.device
) -> tuple[int, list[dict[str, Any]]] | None:
    """What `save_rollouts` wrote; None where nothing was left to use, or where it does not fit this run's layout, in
    which case a warning says so. Every process gets its own, or none gets any: they generate together.

    Raises:
        ValueError: on every process, where the file of one cannot be read.
    """
    state, torn = None, None
    if os.path.isfile(path):
        try:
            # torch cannot restore to "cpu:0", which is what Accelerate calls the CPU of several processes
            state = torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            torn = f"{path} cannot be read ({error})"
    fits = state is not None and (state["processes"], len(state["batches"])) == (processes, steps_per_generation)
    seen = gather_object([(torn, state is not None, fits)])
    if torn := next((torn for torn, _, _ in seen if torn), None):
        raise ValueError(
            f"{torn}: the checkpoint is incomplete. Resume from another one; or delete its rlsd_rollouts_*.pt, "
            "and the completions that they hold are generated anew."
        )
    if all(fits for _, _, fits in seen):
        return state["step"], state["batches"]
    if any(found for _, found, _ in seen):
        logger.warning(
            "The checkpoint's unused completions are of another number of processes or steps_per_generation, or not "
            "there for every process; new ones are generated."
        )
    return None


def steps_of_batch(now: int, micro_batches: int, args: GRPOConfig) -> range:
    """The optimizer steps in which slices of the batch that is generated now can be used.

    Args:
        now: the optimizer step.
        micro_batches: micro-batches done.
        args: how often, and in steps of how many micro-batches, a batch is used.
    """
    uses, accumulation = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
    aligned = uses % accumulation == 0 and micro_batches % accumulation == 0
    return range(now, now + (uses - 1) // accumulation + (1 if aligned else 2))
