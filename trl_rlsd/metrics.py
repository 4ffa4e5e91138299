"""Credit diagnostics: tensors in, `{name: (sum, count)}` out. Needs torch alone.

Sums and counts, not means: a mean over micro-batches and ranks is then the sum of sums over the sum of counts, however
unevenly the tokens are spread. A metric that nothing counted (count 0) has no value, rather than nan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


# Names and order are fixed, so that every rank reduces the same vector whatever its rows were.
TOKEN_METRICS = (
    "gain_mean",
    "kl",
    "weight_mean_pos",
    "weight_mean_neg",
    "clip_low",
    "clip_high",
)
ROW_METRICS = ("lambda", "no_context", "skipped", "teacher_seconds")
METRICS = (*ROW_METRICS, *TOKEN_METRICS)


def credit_metrics(
    advantages: torch.Tensor,
    gains: torch.Tensor,
    weights: torch.Tensor,
    clipped_weights: torch.Tensor,
    mask: torch.Tensor,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the teacher said about the tokens that count.

    - `gain_mean`: mean gain. Its expectation is -KL(student || teacher) <= 0 on fresh samples.
    - `kl`: the same divergence by the estimator exp(gain) - 1 - gain, which is never negative and less noisy; the
      exponent is clamped at 20, so one absurd token cannot drown the rest (http://joschu.net/blog/kl-approx.html, k3).
    - `weight_mean_pos`, `weight_mean_neg`: mean clipped weight over tokens with A > 0, with A < 0.
    - `clip_low`, `clip_high`: share of the tokens with A != 0 whose weight was clipped from below, from above.

    With gain = 0 everywhere: 0, 0, 1, 1, 0, 0. Tokens with mask 0 count nowhere.

    Shapes: `advantages` (B,), the others (B, T); values are pairs of 0-dim float32 tensors (sum, count).
    Units: nats for `gain_mean` and `kl`; the others are ratios.
    """
    counted = mask.bool()
    positive = counted & (advantages > 0).unsqueeze(1)
    negative = counted & (advantages < 0).unsqueeze(1)
    bounded = gains.clamp(max=20.0)
    values = {
        "gain_mean": (gains, counted),
        "kl": (bounded.exp() - 1.0 - bounded, counted),
        "weight_mean_pos": (clipped_weights, positive),
        "weight_mean_neg": (clipped_weights, negative),
        "clip_low": (weights < clipped_weights, positive | negative),
        "clip_high": (weights > clipped_weights, positive | negative),
    }
    return {
        name: (torch.where(where, value.float(), 0.0).sum(), where.sum().float())
        for name, (value, where) in values.items()
    }


class MetricSums:
    """The sums and counts since the last log. They stay on the device, so that adding waits for nothing."""

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.totals = torch.zeros(len(METRICS), 2, device=device, dtype=dtype)

    def add(self, values: Mapping[str, tuple[Any, Any]]) -> None:
        """Add `{name: (sum, count)}`; the names are those of `METRICS`."""
        for name, pair in values.items():
            entry = self.totals[METRICS.index(name)]
            for position, value in enumerate(pair):
                entry[position] += value

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means by name; then starts anew. `reduce` sums a tensor over all ranks, so every rank must call this."""
        totals = reduce(self.totals.clone()).tolist()
        self.totals.zero_()
        return {name: value / count for name, (value, count) in zip(METRICS, totals, strict=True) if count > 0}
