"""Credit functions that `credit_search.py` tries. `gate_decided` has become the package's `rlsd_gate`; the others
are not part of it.

All are A_t = A * [(1 - lam) + lam * gate_t] with a gate in [0, 1]. With S and T the student's and the teacher's
probability of a token, p = 1 - min(1, S/T) is how far the reference made it likelier, and r = 1 - min(1, T/S) how
likely speculative decoding (arXiv:2211.17192) refuses it, were the student its draft model and the teacher its
verifier.
"""

from __future__ import annotations

import torch

from trl_rlsd import register_credit
from trl_rlsd.credit import gain, reference_gate
from trl_rlsd.credit.gain import DEAD_ZONE
from trl_rlsd.lab.credit import dealt_anew


MOST = 60.0  # nats; infinite evidence could not be taken away from a sum again


def gate(name, function, contrast=False):
    """Register a gate: function(evidence (B, T), positive (B, 1), mask (B, T)) -> (B, T). With a contrast the gain
    over a wrong reference comes second: function(evidence, against, positive, mask)."""

    @register_credit(name, teacher_rows="nonzero_advantage", keeps_sign=True, uses_lambda=True, contrast=contrast)
    def credit(advantages, student_logps, teacher_logps, mask, *, lam, wrong_logps=None, **knobs):
        advantages = advantages.unsqueeze(1)
        others = (student_logps, wrong_logps) if contrast else (student_logps,)
        gains = [gain(other, teacher_logps, mask).clamp(-MOST, MOST) for other in others]
        return advantages * ((1.0 - lam) + lam * function(*gains, advantages > 0, mask))


def shuffled(function):
    """A control: the same gates on other tokens of their completion."""
    return lambda *arguments: dealt_anew(function(*arguments), arguments[-1])


def likelier(evidence):
    """p"""
    return -torch.expm1(-evidence.clamp(min=0.0))


def first_refused(evidence):
    """The chance that a token is the first refused: r_t prod_{u<t} (1 - r_u)."""
    accepted = evidence.clamp(max=0.0)  # log of the chance
    return -torch.expm1(accepted) * (accepted.cumsum(1) - accepted).exp()


def silent(evidence):
    """The chance that the reference has nothing to say about a row: its tokens together."""
    return (-evidence.abs().sum(1, keepdim=True)).exp()


def beyond_the_dead_zone(evidence):
    """Gains under a quarter of a nat count as 0, larger ones are reduced by it."""
    return evidence.sign() * (evidence.abs() - DEAD_ZONE).clamp(min=0.0)


def drop(evidence, positive, mask):
    """Praise by |gain|; blame for the first token whose gain is under -1, for all where there is none."""
    drops = (evidence < -1.0) & mask.bool()
    first = drops & (drops.cumsum(1) == 1)
    blamed = torch.where(first.any(1, keepdim=True), first, torch.ones_like(first)).to(evidence.dtype)
    return torch.where(positive, likelier(evidence.abs()), blamed)


def refusal(evidence, positive, mask):
    """Praise for what is likelier, blame for the first refused; a row without such tokens stays with GRPO."""
    praise = likelier(evidence) + silent(evidence.clamp(min=0.0))
    return torch.where(positive, praise, first_refused(evidence) + silent(evidence.clamp(max=0.0)))


def refusal_dead(evidence, positive, mask):
    """`refusal` with a dead zone, and without what a silent row gets."""
    evidence = beyond_the_dead_zone(evidence)
    return torch.where(positive, likelier(evidence), first_refused(evidence))


def decided(evidence, against, positive, mask):
    """`refusal_dead`, with praise only for what a wrong reference does not make likelier as well: citing a reference,
    or its style. It is `rlsd_gate` now."""
    return reference_gate(evidence, against, positive.squeeze(1).float())


def decided_silent(evidence, against, positive, mask):
    """`refusal`, with praise only for what a wrong reference does not make likelier as well."""
    return refusal(torch.where(positive, torch.minimum(evidence, against), evidence), positive, mask)


def even(evidence, positive, mask):
    """The same tokens for praise and blame."""
    return causal(evidence, positive, mask) + silent(evidence)


def causal(evidence, positive, mask):
    """As `refusal`, but the same for both verdicts and without what follows, so that it pushes nothing towards what
    the teacher likes before anything has decided."""
    return likelier(evidence) + first_refused(evidence)


def causal_dead(evidence, positive, mask):
    return causal(beyond_the_dead_zone(evidence), positive, mask)


def local(evidence, positive, mask):
    """A token's own gain, of either sign: no memory of the tokens before it, and the same for both verdicts. A token
    on which the verdict does not depend is then pushed nowhere on average, if teacher and student each treat it alike
    whatever came before; with `causal` that holds only until something has decided."""
    return likelier(evidence.abs())


def local_dead(evidence, positive, mask):
    return local(beyond_the_dead_zone(evidence), positive, mask)


def _named(choices, controlled):
    """The gates by name, and the controls of some of them."""
    controls = {f"gate_{function.__name__}_shuffled": shuffled(function) for function in controlled}
    return {f"gate_{function.__name__}": function for function in choices} | controls


GATES = _named(
    (drop, refusal, refusal_dead, even, causal, causal_dead, local, local_dead), (refusal, causal_dead, local_dead)
)
CONTRASTS = _named((decided, decided_silent), (decided,))
for name, function in GATES.items():
    gate(name, function)
for name, function in CONTRASTS.items():
    gate(name, function, contrast=True)
