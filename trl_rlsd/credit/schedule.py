"""The mixing weight over time, and which rows have anything to mix."""

from __future__ import annotations

import torch


def lambda_at(step: int, *, peak: float, warmup_steps: int, decay_steps: int) -> float:
    """The mixing weight lambda at an optimizer step: a line up to `peak`, then a line down to 0.

        lambda(s) = peak * s / warmup               while s < warmup
                    peak * max(1 - (s - warmup) / decay, 0)   from then on; decay = 0 keeps the peak

    With the paper's values (peak 0.5, no warm-up, decay over 50 steps) it is 0.5 at step 0, 0.25 at step 25 and 0 from
    step 50 on. Source: arXiv:2604.03128, training details.

    Units: `step` counts finished optimizer steps (`trainer.state.global_step`).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay_steps == 0:
        return peak
    return peak * max(1.0 - (step - warmup_steps) / decay_steps, 0.0)


def informative(advantages: torch.Tensor, normalized: bool) -> torch.Tensor:
    """The rows whose advantage gives a multiplicative credit something to multiply.

    The mean of a group of equal rewards misses them by a rounding error; where TRL divides by a standard deviation of
    about 1e-4 (`normalized`), 8 rewards of 0.1 give A = -7e-5 instead of 0.

    Shapes: (B,); returns (B,) bool.
    """
    rounding = 1e-3 if normalized else 1e-6
    return advantages.abs() > rounding
