"""Completions that are still to be used when a checkpoint is written, so that a resumed run equals the uninterrupted
one. TRL 1.16 forgets them, and its place among them: it would generate anew."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.logging import get_logger
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
    which case a warning says so."""
    if not os.path.isfile(path):
        return None
    state = torch.load(path, map_location=device, weights_only=True)
    if (state["processes"], len(state["batches"])) != (processes, steps_per_generation):
        logger.warning(
            "The checkpoint's unused completions are of another number of processes or steps_per_generation; new ones "
            "are generated."
        )
        return None
    return state["step"], state["batches"]


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
