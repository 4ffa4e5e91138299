"""Credit that is a multiple of the advantage: the verdict decides the direction, the evidence the size."""

from __future__ import annotations

import torch

from trl_rlsd.credit.gain import gain, reference_gate, signed_weight
from trl_rlsd.credit.registry import register_credit


@register_credit("grpo", teacher_rows="none", keeps_sign=True, uses_lambda=False)
def grpo_credit(
    advantages: torch.Tensor, student_logps: torch.Tensor, teacher_logps: torch.Tensor, mask: torch.Tensor, **knobs
) -> torch.Tensor:
    """GRPO: every token of a sequence gets the sequence's advantage, A_t = A.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Source: arXiv:2402.03300.
    """
    return advantages.unsqueeze(1).expand(student_logps.shape)


@register_credit("rlsd", teacher_rows="nonzero_advantage", keeps_sign=True, uses_lambda=True, evidence="gain")
def rlsd_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    lam: float | torch.Tensor,
    clip_range: float | torch.Tensor,
    negative_only: bool,
    **knobs,
) -> torch.Tensor:
    """RLSD: the verdict decides the direction, the privileged teacher the magnitude.

        A_t = A * [(1 - lam) + lam * clip(exp(sign(A) * gain_t), 1 - eps_w, 1 + eps_w)]

    lam = 0 is GRPO bit for bit, gain = 0 as well; the factor is never negative, so no token is pushed against the
    verdict. `negative_only` reweights the rows with A < 0 alone. Source: arXiv:2604.03128.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: log-probs in nats.
    """
    _, weight = signed_weight(gain(student_logps, teacher_logps, mask), advantages, clip_range)
    return _mixed(advantages, weight, lam, negative_only)


@register_credit(
    "rlsd_contrast",
    teacher_rows="nonzero_advantage",
    keeps_sign=True,
    uses_lambda=True,
    contrast=True,
    evidence="contrast",
)
def rlsd_contrast_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    wrong_logps: torch.Tensor,
    lam: float | torch.Tensor,
    clip_range: float | torch.Tensor,
    negative_only: bool,
    **knobs,
) -> torch.Tensor:
    """RLSD against a wrong reference: what any reference changes (style, brevity) cancels, what its rightness changes
    stays.

        evidence_t = log T+_t - log T-_t        teacher after the right reference, and after a wrong one
        A_t        = A * [(1 - lam) + lam * clip(exp(sign(A) * evidence_t), 1 - eps_w, 1 + eps_w)]

    lam = 0 is GRPO bit for bit; with T- = S it is `rlsd`; with T- = T+ it is GRPO. Sources: arXiv:2605.19436 (CEPO)
    and its code, arXiv:2606.11709 ("RLSD + e_ctr"). Evidence, theirs: +2.2 over one-sided RLSD on math, +0.5 on
    logic (4B) where rows without a wrong sibling were left out of training, which RLSD's rows were not.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: log-probs in nats.
    """
    _, weight = signed_weight(gain(wrong_logps, teacher_logps, mask), advantages, clip_range)
    return _mixed(advantages, weight, lam, negative_only)


@register_credit(
    "rlsd_gate",
    teacher_rows="nonzero_advantage",
    keeps_sign=True,
    uses_lambda=True,
    contrast=True,
    evidence="gate",
)
def rlsd_gate_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    wrong_logps: torch.Tensor,
    lam: float | torch.Tensor,
    **knobs,
) -> torch.Tensor:
    """RLSD as a gate: praise for what the right reference alone makes likelier, blame for the first token it rejects.

        A_t = A * [(1 - lam) + lam * gate_t]
        A > 0:   gate_t = 1 - exp(-max(min(gain_t, contrast_t) - d, 0))      contrast_t = log T+_t - log T-_t
        A < 0:   gate_t = r_t * prod_{u<t} (1 - r_u)      r_t = 1 - exp(min(gain_t + d, 0))

    With d = 0, r_t is how likely speculative decoding (arXiv:2211.17192) rejects a token, the student being the draft
    model and the teacher its verifier, so that blame has the distribution of the first rejected token. What follows it
    is spared: it continues what went wrong, and the teacher dislikes it for that. What any reference makes likelier,
    citing it for one, has no contrast and is not praised. d = 1/4 nat is a dead zone. lam = 0 is GRPO bit for bit; a
    reference that says nothing leaves (1 - lam) * A to all. The gate lies in [0, 1], and the gates of a failure sum to
    1 at most; there is no clip range.

    It is meant for a constant lambda (`rlsd_lambda_decay_steps=0`: steps grow as lambda falls) and a learning rate of
    its own. What it does not act on keeps all of A, 1 / (1 - lam) times what is left to others: so the config wants
    `contrast_fallback="one_sided"` and refuses `credit_span` and `rlsd_negative_only`; see to it that all rows have
    context. Without a wrong reference (`rlsd/no_contrast`) the gain decides alone, and citing is praised in a success.

    Limits. Where the teacher's style differs by more than d before a mistake, or by a little less all along a long
    completion, the first rejected token is one of style: `rlsd/weight_max_neg` near 1 - lam tells that blame is
    spread, or that nothing was rejected. What the right reference makes likelier and a wrong one does not is praised
    in successes and spared in failures, whether or not the verdict depends on it: watch `rlsd/leak_overlap`. The
    examples of `tests/test_theory.py` have both.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: log-probs in nats. Source: this package.
    Evidence, ours, lam = 0.9, on toy tasks with completions of 111 tokens, held out from the choice: at most 0.34
    [0.28, 0.40] of GRPO's steps to 0.5, +0.30 [+0.25, +0.35] in accuracy (8 seeds); nothing with the same gates on
    other tokens. README, "Compare", has how it was found, and what was not measured.
    """
    gate = reference_gate(gain(student_logps, teacher_logps, mask), gain(wrong_logps, teacher_logps, mask), advantages)
    return _mixed(advantages, gate, lam, negative_only=False)


@register_credit("rlrt", teacher_rows="positive_advantage", keeps_sign=True, uses_lambda=True, evidence="reversed")
def rlrt_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    lam: float | torch.Tensor,
    clip_range: float | torch.Tensor,
    **knobs,
) -> torch.Tensor:
    """The reversed teacher: in a success, what the teacher would not have written weighs more.

        A_t = A * [(1 - lam) + lam * clip(S_t / T_t, 1 - eps_w, 1 + eps_w)]      where A > 0; elsewhere A_t = A

    lam = 0 is GRPO bit for bit, gain = 0 as well. Source: arXiv:2605.10781 (RLRT), in which the reward, not A > 0, is
    the gate (the same for right/wrong rewards), the teacher reads another right completion, and eps_w is 1.0 for
    base, 0.5 for instruct and 0.2 for thinking models. Evidence, theirs: above GRPO and RLSD on AIME with
    Qwen3-4B-Base; without the gate training diverged. No official code was found.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: log-probs in nats.
    """
    _, weight = signed_weight(-gain(student_logps, teacher_logps, mask), advantages, clip_range)
    weight = torch.where(advantages.unsqueeze(1) > 0, weight, torch.ones_like(weight))
    return _mixed(advantages, weight, lam, negative_only=False)


def _mixed(advantages, weight, lam, negative_only) -> torch.Tensor:
    if negative_only:
        weight = torch.where(advantages.unsqueeze(1) < 0, weight, torch.ones_like(weight))
    return advantages.unsqueeze(1) * ((1.0 - lam) + lam * weight)
