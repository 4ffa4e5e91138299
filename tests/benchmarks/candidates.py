"""Credit functions that `credit_search.py` tries; none of them is part of the package."""

from __future__ import annotations

import torch

from trl_rlsd import register_credit
from trl_rlsd.credit import gain


def gated(advantages, relevance, lam):
    """A_t = A * [(1 - lam) + lam * relevance_t], relevance in [0, 1]."""
    return advantages.unsqueeze(1) * ((1.0 - lam) + lam * relevance)


def toward(evidence, advantages):
    """1 - exp(-x), x the evidence in the direction of the verdict where it has that direction, else 0."""
    return 1.0 - torch.exp(-(advantages.sign().unsqueeze(1) * evidence).clamp(min=0.0))


def size(evidence):
    """1 - exp(-|x|): how much the reference matters to the token, whichever way."""
    return 1.0 - torch.exp(-evidence.abs())


def first_drop(evidence, mask, threshold=1.0):
    """1 at the first token whose evidence falls under -threshold, else 0; all 1 where there is none."""
    drops = (evidence < -threshold) & mask.bool()
    first = drops & (drops.cumsum(1) == 1)
    return torch.where(first.any(1, keepdim=True), first, torch.ones_like(first)).to(evidence.dtype)


def by_sign(advantages, positive, negative):
    return torch.where(advantages.unsqueeze(1) > 0, positive, negative)


_PLAIN = dict(teacher_rows="nonzero_advantage", keeps_sign=True, uses_lambda=True)


@register_credit("gate_toward", **_PLAIN)
def gate_toward(advantages, student_logps, teacher_logps, mask, *, lam, **knobs):
    return gated(advantages, toward(gain(student_logps, teacher_logps, mask), advantages), lam)


@register_credit("gate_drop", **_PLAIN)
def gate_drop(advantages, student_logps, teacher_logps, mask, *, lam, **knobs):
    evidence = gain(student_logps, teacher_logps, mask)
    return gated(advantages, by_sign(advantages, size(evidence), first_drop(evidence, mask)), lam)


@register_credit("damped_blame", teacher_rows="none", keeps_sign=True, uses_lambda=True)
def damped_blame(advantages, student_logps, teacher_logps, mask, *, lam, **knobs):
    """A control: less blame, on whichever token."""
    return (advantages.unsqueeze(1) * (1.0 - lam)).expand_as(student_logps)
