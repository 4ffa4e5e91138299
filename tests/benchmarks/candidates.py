"""Credit functions that `credit_search.py` tries; none of them is part of the package."""

from __future__ import annotations

import torch

from trl_rlsd import register_credit
from trl_rlsd.credit import gain
from trl_rlsd.credit.multiplicative import verdict_gate
from trl_rlsd.lab.credit import dealt_anew


_PLAIN = dict(teacher_rows="nonzero_advantage", keeps_sign=True, uses_lambda=True)


def gated(advantages, relevance, lam):
    """A_t = A * [(1 - lam) + lam * relevance_t], relevance in [0, 1]."""
    return advantages.unsqueeze(1) * ((1.0 - lam) + lam * relevance)


def by_sign(advantages, positive, negative):
    return torch.where(advantages.unsqueeze(1) > 0, positive, negative)


def size(evidence):
    """1 - exp(-|x|): how much the reference matters to the token, whichever way."""
    return 1.0 - torch.exp(-evidence.abs())


def first_drop(evidence, mask, threshold=1.0):
    """1 at the first token whose evidence falls under -threshold, else 0; all 1 where there is none."""
    drops = (evidence < -threshold) & mask.bool()
    first = drops & (drops.cumsum(1) == 1)
    return torch.where(first.any(1, keepdim=True), first, torch.ones_like(first)).to(evidence.dtype)


@register_credit("gate_drop", **_PLAIN)
def gate_drop(advantages, student_logps, teacher_logps, mask, *, lam, **knobs):
    evidence = gain(student_logps, teacher_logps, mask)
    return gated(advantages, by_sign(advantages, size(evidence), first_drop(evidence, mask)), lam)


@register_credit("gate_drop_sharp", **_PLAIN)
def gate_drop_sharp(advantages, student_logps, teacher_logps, mask, *, lam, **knobs):
    """As above, but a quarter of a nat is enough to be praised."""
    evidence = gain(student_logps, teacher_logps, mask)
    return gated(advantages, by_sign(advantages, size(4.0 * evidence), first_drop(evidence, mask)), lam)


@register_credit("gate_drop_shuffled", **_PLAIN)
def gate_drop_shuffled(advantages, student_logps, teacher_logps, mask, *, lam, **knobs):
    """A control: the gates of `gate_drop_sharp` on other tokens of their completion."""
    evidence = gain(student_logps, teacher_logps, mask)
    gates = by_sign(advantages, size(4.0 * evidence), first_drop(evidence, mask))
    return gated(advantages, dealt_anew(gates, mask), lam)


@register_credit("gate_closed", **_PLAIN)
def gate_closed(advantages, student_logps, teacher_logps, mask, *, lam, **knobs):
    """`rlsd_gate`, but a success to which the reference adds nothing is not praised."""
    evidence = gain(student_logps, teacher_logps, mask)
    praise = 1.0 - torch.exp(-evidence.clamp(min=0.0))
    return gated(advantages, by_sign(advantages, praise, verdict_gate(evidence, advantages)), lam)


@register_credit("gate_shuffled", **_PLAIN)
def gate_shuffled(advantages, student_logps, teacher_logps, mask, *, lam, **knobs):
    """The control of `rlsd_gate`: its gates on other tokens of their completion."""
    gates = verdict_gate(gain(student_logps, teacher_logps, mask), advantages)
    return gated(advantages, dealt_anew(gates, mask), lam)
