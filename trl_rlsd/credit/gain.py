"""What a reference adds to the log-probability of each token, and the multiplier, or the gate, that it becomes."""

from __future__ import annotations

import torch


# exp() of more than this is clamped, in either direction: outside any clip range that is of use, inside float32, and
# small enough to be taken from a sum again
_MAX_EXPONENT = 60.0
# nats; a gate takes no notice of less, so that small differences all along a completion do not add up. That there is
# one was chosen on validation problems, its width was not tuned.
DEAD_ZONE = 0.25


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gain(student_logps: torch.Tensor, teacher_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the privileged context adds to each token's log-probability: teacher - student, and 0 at pads.

    A token that the reference makes likelier has a positive gain; where teacher and student read the same prompt with
    the same weights it is 0. Computed in float32 at least, without gradient.

    Shapes: all (B, T). Units: nats. Source: arXiv:2604.03128.
    """
    student_logps, teacher_logps = at_least_float32(student_logps), at_least_float32(teacher_logps)
    # the pads go before the subtraction: inf - inf and nan * 0 are both nan
    keep = mask.bool()
    return teacher_logps.detach().masked_fill(~keep, 0.0) - student_logps.detach().masked_fill(~keep, 0.0)


def signed_weight(
    evidence: torch.Tensor, advantages: torch.Tensor, clip_range: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The multiplier exp(sign(A) * evidence), and the same clipped to [1 - clip_range, 1 + clip_range].

    evidence = 0 or A = 0 gives 1; with A > 0 a token that the evidence supports weighs more, with A < 0 it weighs
    less, so a failed attempt's blame goes to the tokens that the reference would not have written.

    Shapes: `evidence` (B, T) in nats, `advantages` (B,), `clip_range` a number or (B, 1); returns two of (B, T).
    Source: arXiv:2604.03128, with the gain as evidence.
    """
    exponent = torch.sign(advantages).to(evidence.dtype).unsqueeze(1) * evidence
    weight = exponent.clamp(-_MAX_EXPONENT, _MAX_EXPONENT).exp()
    clip_range = torch.as_tensor(clip_range, dtype=weight.dtype, device=weight.device)
    return weight, weight.clamp(1.0 - clip_range, 1.0 + clip_range)


def reference_gate(gains: torch.Tensor, contrast: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """How far each token's credit depends on the reference: where A > 0 how far the right one, and no wrong one, makes
    it likelier; else the chance that it is the first token that speculative decoding (arXiv:2211.17192) rejects.

    Shapes: `gains`, `contrast` (B, T) in nats, 0 where they do not count, `advantages` (B,); returns (B, T) in [0, 1].
    """
    likelier = (torch.minimum(gains, contrast) - DEAD_ZONE).clamp(0.0, _MAX_EXPONENT)
    rarer = (gains + DEAD_ZONE).clamp(-_MAX_EXPONENT, 0.0)
    accepted_before = (rarer.cumsum(1) - rarer).exp()
    return torch.where(advantages.unsqueeze(1) > 0, -torch.expm1(-likelier), -torch.expm1(rarer) * accepted_before)
