"""Credit that is added to the advantage, or takes its place."""

from __future__ import annotations

import math

import torch

from trl_rlsd.credit.gain import gain
from trl_rlsd.credit.registry import register_credit


# RLCSD's, the same in all of its configurations
_RLCSD_TAU = 0.02
_RLCSD_DROPPED = 0.02
_SDAR_SLOPE = 5.0


@register_credit("opsd", teacher_rows="all")
def opsd_credit(
    advantages: torch.Tensor, student_logps: torch.Tensor, teacher_logps: torch.Tensor, mask: torch.Tensor, **knobs
) -> torch.Tensor:
    """On-policy (self-)distillation: the gain is the credit, A_t = gain_t, and the verdict is not used.

    Its expected gradient is that of -KL(student || teacher) for one token ahead; gain = 0 gives no update. With an
    external teacher and the template `{prompt}` it is on-policy distillation. Lambda does not act on it.
    Source: the OPSD baseline of arXiv:2604.03128, which reports that it peaks early and then leaks the reference.

    Shapes: (B, T) but for `advantages` (B,), unused; returns (B, T). Units: nats.
    """
    return gain(student_logps, teacher_logps, mask)


@register_credit("grpo_opsd", teacher_rows="all", uses_lambda=True)
def grpo_opsd_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    lam: float | torch.Tensor,
    **knobs,
) -> torch.Tensor:
    """The additive hybrid of GRPO and self-distillation: A_t = A + lam * gain_t.

    lam = 0 is GRPO bit for bit. The sign is not kept: a large gain can turn the verdict over, which is what RLSD rules
    out. Source: the GRPO + OPSD baseline of arXiv:2604.03128.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: nats.
    """
    return advantages.unsqueeze(1) + lam * gain(student_logps, teacher_logps, mask)


@register_credit("rlcsd", teacher_rows="nonzero_advantage", keeps_sign=True, uses_lambda=True, contrast=True)
def rlcsd_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    wrong_logps: torch.Tensor,
    lam: float | torch.Tensor,
    **knobs,
) -> torch.Tensor:
    """RLCSD's residual: the contrast of a right and a wrong reference, squashed and added, within the verdict's sign.

        residual_t = lam * tanh((log T+_t - log T-_t) / 0.02), 0 where its size is at most 0.02
        A_t        = max(A + residual_t, 0) for A > 0, min(A + residual_t, 0) for A < 0, 0 for A = 0

    lam = 0 or T- = T+ is GRPO. The squashing is so steep that the residual is nearly lam times a sign. Source:
    arXiv:2606.11709 and its code (one wrong reference here, up to four there, whose probabilities are averaged; there
    lam = 0.5 without decay, and tokens with and without residual are averaged apart, which no token credit can
    express). Evidence, theirs: +1.1, +1.0, +0.7, +0.1 over GRPO on math on four models.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: log-probs in nats.
    """
    residual = lam * torch.tanh(gain(wrong_logps, teacher_logps, mask) / _RLCSD_TAU)
    residual = torch.where(residual.abs() > _RLCSD_DROPPED, residual, torch.zeros_like(residual))
    advantages = advantages.unsqueeze(1)
    moved = advantages + residual
    moved = torch.where(advantages > 0, moved.clamp(min=0.0), moved.clamp(max=0.0))
    return torch.where(advantages == 0, torch.zeros_like(moved), moved)


@register_credit("contrast_additive", teacher_rows="all", uses_lambda=True, contrast=True)
def contrast_additive_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    wrong_logps: torch.Tensor,
    lam: float | torch.Tensor,
    clip_range: float | torch.Tensor,
    **knobs,
) -> torch.Tensor:
    """The contrast, clipped and added: A_t = A + lam * clip(log T+_t - log T-_t, -eps_w, eps_w).

    lam = 0 or T- = T+ is GRPO. It also teaches groups in which every completion failed, where A = 0 and a
    multiplicative credit is silent; the price is that it can turn a verdict over, where |A| < lam * eps_w. Source:
    this package, in the direction of arXiv:2609.36742 (SIPO), whose exact formula could not be confirmed. Evidence:
    none yet.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: log-probs in nats.
    """
    evidence = gain(wrong_logps, teacher_logps, mask)
    clip_range = torch.as_tensor(clip_range, dtype=evidence.dtype, device=evidence.device)
    return advantages.unsqueeze(1) + lam * evidence.clamp(-clip_range, clip_range)


@register_credit("antisd", teacher_rows="all", uses_lambda=True)
def antisd_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    lam: float | torch.Tensor,
    **knobs,
) -> torch.Tensor:
    """Anti-self-distillation: away from the teacher, by a bounded bonus where it is surprised.

        A_t = A - lam * (softplus(gain_t) - log 2) / 2

    lam = 0 or gain = 0 is GRPO; the bonus is at most lam * 0.347, the penalty grows with the gain; groups with A = 0
    are taught too. Source: arXiv:2605.11609, read in full (lam 0.5 there). **Its entropy gate is not part of this**:
    there lam becomes 0 once the teacher's median entropy falls under 0.93 of its first steps', and without that gate
    training collapsed after a gain. Keep the decay of lambda. Evidence, theirs: GRPO's accuracy in 2 to 10 times fewer
    steps, 4B to 30B.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: nats.
    """
    gains = gain(student_logps, teacher_logps, mask)
    return advantages.unsqueeze(1) - lam * (torch.nn.functional.softplus(gains) - math.log(2.0)) / 2.0


@register_credit("sdar", teacher_rows="all", uses_lambda=True)
def sdar_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    lam: float | torch.Tensor,
    **knobs,
) -> torch.Tensor:
    """SDAR's gated distillation as an advantage: A_t = A + lam * sigmoid(5 * gain_t).

    There it is a loss, lam * sigmoid(5 * gain_t) * (log T_t - log S_t) with the gate detached, whose gradient is that
    of this advantage on the policy that sampled: every token is raised, those that the teacher supports more. lam = 0
    is GRPO; gain = 0 adds lam / 2. Source: arXiv:2605.15155 and its code, where **lam is 0.01**: set `rlsd_lambda`
    and `rlsd_lambda_decay_steps=0`. Evidence, theirs: +7 to +10 over GRPO on three agent benchmarks.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: log-probs in nats.
    """
    return advantages.unsqueeze(1) + lam * torch.sigmoid(_SDAR_SLOPE * gain(student_logps, teacher_logps, mask))
