"""Credit diagnostics: tensors in, `{name: (sum, count)}` out. Needs torch alone.

Sums and counts, not means: a mean over micro-batches and ranks is then the sum of sums over the sum of counts, however
unevenly the tokens are spread. A metric that nothing counted (count 0) has no value, rather than nan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
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
    "clip_low_pos",
    "clip_low_neg",
    "clip_high_pos",
    "clip_high_neg",
    "gain_sum_pos",
    "gain_sum_neg",
)
GATE_METRICS = ("weight_max_pos", "weight_max_neg")
PLACE_METRICS = (
    *(f"credit_quarter_{quarter}" for quarter in (1, 2, 3, 4)),
    "credit_on_answer",
    "moved_on_answer",
    "tokens_on_answer",
    "sign_agreement",
)
ROW_METRICS = (
    "lambda",
    "lambda_negative",
    "no_context",
    "no_contrast",
    "no_span",
    "privileged_tokens_cut",
    "skipped",
    "teacher_seconds",
    "leak_overlap",
    "leak_cites",
    "right",
    "length",
)
METRICS = (*ROW_METRICS, *TOKEN_METRICS, *GATE_METRICS, *PLACE_METRICS)


_TREND_LOGS = 3

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def gain_metrics(advantages: torch.Tensor, gains: torch.Tensor, mask: torch.Tensor) -> Pairs:
    """What the teacher said about the tokens that count.

    - `gain_mean`: mean gain. Its expectation is -KL(student || teacher) <= 0 on fresh samples.
    - `kl`: the same divergence by the estimator exp(gain) - 1 - gain, which is never negative and less noisy; the
      exponent is clamped at 20, so one absurd token cannot drown the rest (http://joschu.net/blog/kl-approx.html, k3).
    - `gain_sum_pos`, `gain_sum_neg`: mean over completions with A > 0, with A < 0, of the sum of their gains: how the
      belief in the reference changes while reading. Of a student that is the teacher's mean over references, a sum is
      at most -log of the reference's prior; a right completion's that is far below 0 tells of miscalibration.

    With gain = 0 everywhere: all 0. Tokens with mask 0 count nowhere.

    Shapes: `advantages` (B,), the others (B, T); values are pairs of 0-dim float32 tensors (sum, count). Units: nats.
    """
    counted = mask.bool()
    bounded = gains.clamp(max=20.0)
    sums = gains.float().masked_fill(~counted, 0.0).sum(1)
    positive, negative = (counted.any(1) & side for side in (advantages > 0, advantages < 0))
    return _pairs(
        {
            "gain_mean": (gains, counted),
            "kl": (bounded.exp() - 1.0 - bounded, counted),
            "gain_sum_pos": (sums, positive),
            "gain_sum_neg": (sums, negative),
        }
    )


def weight_metrics(
    advantages: torch.Tensor, weights: torch.Tensor, clipped_weights: torch.Tensor, mask: torch.Tensor
) -> Pairs:
    """The weights of a multiplicative credit.

    - `weight_mean_pos`, `weight_mean_neg`: mean clipped weight over tokens with A > 0, with A < 0.
    - `clip_low`, `clip_high`: share of the tokens with A != 0 whose weight was clipped from below, from above; with
      `_pos` and `_neg` of those with A > 0, A < 0.

    Weight 1 everywhere gives 1, 1, 0, ..., 0. Shapes and values: see [`gain_metrics`].
    """
    positive, negative = (mask.bool() & side.unsqueeze(1) for side in (advantages > 0, advantages < 0))
    low, high = weights < clipped_weights, weights > clipped_weights
    return _pairs(
        {
            "weight_mean_pos": (clipped_weights, positive),
            "weight_mean_neg": (clipped_weights, negative),
            "clip_low": (low, positive | negative),
            "clip_high": (high, positive | negative),
            "clip_low_pos": (low, positive),
            "clip_low_neg": (low, negative),
            "clip_high_pos": (high, positive),
            "clip_high_neg": (high, negative),
        }
    )


def factor_metrics(credited: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> Pairs:
    """The factors of a gate.

    - `weight_mean_pos`, `weight_mean_neg`: mean of A_t / A over tokens with A > 0, with A < 0: 1 - lambda where the
      gate is closed, 1 where it is open for every token.
    - `weight_max_pos`, `weight_max_neg`: the largest of each completion, their mean: near 1 - lambda the gate opens
      for no token in particular.

    Shapes: `credited`, `mask` (B, T), `advantages` (B,); values: see [`gain_metrics`], of rows for the largest.
    """
    own = advantages.unsqueeze(1)
    factor, counted = credited / torch.where(own == 0, 1.0, own), mask.bool()
    largest = torch.where(counted, factor, 0.0).amax(1)
    return _pairs(
        {
            "weight_mean_pos": (factor, counted & (own > 0)),
            "weight_mean_neg": (factor, counted & (own < 0)),
            "weight_max_pos": (largest, counted.any(1) & (advantages > 0)),
            "weight_max_neg": (largest, counted.any(1) & (advantages < 0)),
        }
    )


def _pairs(values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Pairs:
    """(values, where they count) -> (sum, count)."""
    return {
        name: (torch.where(where, value.float(), 0.0).sum(), where.sum().float())
        for name, (value, where) in values.items()
    }


def place_metrics(
    credited: torch.Tensor, plain: torch.Tensor, mask: torch.Tensor, answer: torch.Tensor | None = None
) -> Pairs:
    """Where in the completions the credit lies.

    - `credit_quarter_1` to `_4`: share of the sum of |A_t| in each quarter of a completion's tokens; about 0.25 each
      with GRPO.
    - `credit_on_answer`: share of the sum of |A_t| on the final answer, `answer` (B, T).
    - `moved_on_answer`: share of the sum of |A_t - plain|, what the teacher added or took, on the final answer.
    - `tokens_on_answer`: share of the tokens, for comparison.

    Shapes: `credited`, `mask` (B, T), `plain`, A or what a closed gate leaves of it, (B, T) or (B, 1);
    values are pairs of 0-dim float32 tensors (part, whole).
    """
    counted = mask.bool()
    size = credited.abs().float().masked_fill(~counted, 0.0)
    moved = (credited - plain).abs().float().masked_fill(~counted, 0.0)
    position, length = counted.cumsum(1) - 1, counted.sum(1, keepdim=True).clamp(min=1)
    quarter = (4 * position) // length
    values = {
        f"credit_quarter_{number + 1}": (size.masked_fill(quarter != number, 0.0).sum(), size.sum())
        for number in range(4)
    }
    if answer is not None:
        values["credit_on_answer"] = (size.masked_fill(~answer, 0.0).sum(), size.sum())
        values["moved_on_answer"] = (moved.masked_fill(~answer, 0.0).sum(), moved.sum())
        values["tokens_on_answer"] = ((counted & answer).sum().float(), counted.sum().float())
    return values


def sign_agreement(right_gains: torch.Tensor, wrong_gains: torch.Tensor, mask: torch.Tensor) -> Pairs:
    """`sign_agreement`: share of the tokens that a right and a wrong reference move the same way. Near 1 the gain
    tells of having a reference, not of its rightness; arXiv:2607.27888 reports 91 to 96 %.

    Shapes: all (B, T).
    """
    counted = mask.bool() & (right_gains != 0) & (wrong_gains != 0)
    same = counted & (right_gains.sign() == wrong_gains.sign())
    return {"sign_agreement": (same.sum().float(), counted.sum().float())}


class MetricSums:
    """The sums and counts since the last log. They stay on the device, so that adding waits for nothing."""

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.totals = torch.zeros(len(METRICS), 2, device=device, dtype=dtype)
        self.first_lengths: list[float] = []

    def add(self, values: Mapping[str, tuple[Any, Any]]) -> None:
        """Add `{name: (sum, count)}`; the names are those of `METRICS`."""
        for name, pair in values.items():
            entry = self.totals[METRICS.index(name)]
            for position, value in enumerate(pair):
                entry[position] += value

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means by name; then starts anew. `reduce` sums a tensor over all ranks, so every rank must call this.

        `length`, tokens of a completion, becomes `length_trend`: its ratio to the mean of the first three logs since
        this object was made."""
        totals = reduce(self.totals.clone()).tolist()
        self.totals.zero_()
        means = {name: value / count for name, (value, count) in zip(METRICS, totals, strict=True) if count > 0}
        if length := means.pop("length", None):
            self.first_lengths = [*self.first_lengths, length][:_TREND_LOGS]
            means["length_trend"] = length / fmean(self.first_lengths)
        return means
