"""What no user has: an oracle that knows the first wrong token, and a control that knows nothing. Even an oracle is a
reference point, not a bound: it praises what decided, whether or not the policy knows that already."""

from __future__ import annotations

import torch

from trl_rlsd.credit import gain, register_credit, signed_weight


@register_credit("oracle", teacher_rows="none", keeps_sign=True, uses_lambda=True, reads=("decisive", "first_wrong"))
def oracle_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    lam: float | torch.Tensor,
    decisive: torch.Tensor,
    first_wrong: torch.Tensor,
    **knobs,
) -> torch.Tensor:
    """What perfect knowledge gives: praise for the tokens that decided, blame for the first wrong one.

        A_t = A * [(1 - lam) + lam * gate_t]    gate 1 at decisive tokens where A > 0, at the first wrong where A < 0

    lam = 0 is GRPO bit for bit; a row without such a token stays with GRPO. With lam = 1 the form of the text is not
    taught at all, and drifts.

    Shapes: `advantages` (B,), `decisive`, `first_wrong` (B, T) bool, the others (B, T); returns (B, T).
    """
    gate = torch.where(advantages.unsqueeze(1) > 0, decisive, first_wrong) & mask.bool()
    gate = (gate | ~gate.any(1, keepdim=True)).to(advantages.dtype)
    return advantages.unsqueeze(1) * ((1.0 - lam) + lam * gate)


@register_credit("rlsd_shuffled", teacher_rows="nonzero_advantage", keeps_sign=True, uses_lambda=True, evidence="gain")
def rlsd_shuffled_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    lam: float | torch.Tensor,
    clip_range: float | torch.Tensor,
    **knobs,
) -> torch.Tensor:
    """The control: RLSD whose gains are dealt out anew among the tokens of their completion. Whatever is left of its
    effect is not credit.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T).
    """
    dealt = dealt_anew(gain(student_logps, teacher_logps, mask), mask)
    _, weight = signed_weight(dealt, advantages, clip_range)
    return advantages.unsqueeze(1) * ((1.0 - lam) + lam * weight)


def dealt_anew(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values of each row's counted tokens in another order, 0 elsewhere. The order is drawn from a fixed seed, so
    that sampling is not disturbed. Shapes: (B, T) each."""
    keep = mask.bool()
    generator = torch.Generator().manual_seed(int(keep.sum()))
    draws = torch.rand(values.shape, generator=generator).to(values.device)
    # row by row: the counted tokens in a drawn order, behind them the others
    order = draws.masked_fill(~keep, 2.0).argsort(dim=1)
    places = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    dealt = torch.zeros_like(values).scatter(1, places, values.gather(1, order))
    return dealt.masked_fill(~keep, 0.0)
