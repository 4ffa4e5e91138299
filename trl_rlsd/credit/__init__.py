"""Token credit: how much of a sequence's advantage each of its tokens gets. Pure functions; needs torch alone.

Every function here has the same form, so that a trainer can be blind to which one it runs:

    credit(advantages (B,), student_logps (B, T), teacher_logps (B, T), mask (B, T), *, lam, clip_range, negative_only
           [, wrong_logps (B, T)]) -> token advantages (B, T)

`student_logps` are read after the plain prompt, `teacher_logps` after the prompt that also holds the privileged
context, `wrong_logps`, for a function that contrasts, after the same prompt with a wrong reference in its place; all
are of the same sampled tokens, in nats. `lam` and `clip_range` are numbers, or (B, 1) where they differ by the sign of
A. `register_credit` gives a function a name, `token_advantages` runs it by name and keeps, for every function alike,
the laws that a trainer relies on: pads are inert even when they hold nan or inf, rows that no teacher has scored keep
the plain GRPO credit, no gradient reaches the log-probs.

    gain            what a reference adds to a token's log-probability, and the multiplier or gate that it becomes
    registry        names, and the laws
    schedule        lambda over time
    multiplicative  grpo, rlsd, rlsd_contrast, rlsd_gate, rlrt
    additive        opsd, grpo_opsd, rlcsd, contrast_additive, antisd, sdar

CSCR (arXiv:2607.27888) is not among them: neither its formula nor its code could be found.
"""

from trl_rlsd.credit import additive, multiplicative  # they register their functions
from trl_rlsd.credit.gain import gain, reference_gate, signed_weight
from trl_rlsd.credit.registry import Credit, get_credit, mean_one, register_credit, token_advantages
from trl_rlsd.credit.schedule import informative, lambda_at


__all__ = [
    "Credit",
    "additive",
    "gain",
    "get_credit",
    "informative",
    "lambda_at",
    "mean_one",
    "multiplicative",
    "reference_gate",
    "register_credit",
    "signed_weight",
    "token_advantages",
]
