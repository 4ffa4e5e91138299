"""Token credit: how much of a sequence's advantage each of its tokens gets. Pure functions; needs torch alone.

Every function here has the same form, so that a trainer can be blind to which one it runs:

    credit(advantages (B,), student_logps (B, T), teacher_logps (B, T), mask (B, T), *, lam, clip_range, negative_only)
        -> token advantages (B, T)

`student_logps` are read after the plain prompt, `teacher_logps` after the prompt that also holds the privileged
context; both are of the same sampled tokens, in nats. `register_credit` gives a function a name, `token_advantages`
runs it by name and keeps, for every function alike, the laws that a trainer relies on: pads are inert even when they
hold nan or inf, rows that no teacher has scored keep the plain GRPO credit, no gradient reaches the log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


# exp() of more than this is clamped, in either direction: outside any clip range that is of use, inside float32
_MAX_EXPONENT = 60.0


@dataclass(frozen=True)
class Credit:
    """A registered credit function and what a trainer must know to run it.

    Attributes:
        name: what `RLSDConfig(credit=...)` says.
        function: the credit function; see the module's docstring for its form.
        teacher_rows: the rows that need a teacher's log-probs: `"nonzero_advantage"`, where A = 0 gives no credit
            whatever the teacher says; `"all"`; or `"none"`: the function then gets the student's log-probs as the
            teacher's (gain 0), and the dataset needs no privileged column.
        keeps_sign: whether every token's credit has the sign of its sequence's advantage.
        uses_lambda: whether lambda = 0 makes it plain GRPO, so that the teacher can be left out then.
    """

    name: str
    function: Callable[..., torch.Tensor]
    teacher_rows: str
    keeps_sign: bool
    uses_lambda: bool


_TEACHER_ROWS = ("nonzero_advantage", "all", "none")
_REGISTRY: dict[str, Credit] = {}


def register_credit(
    name: str, *, teacher_rows: str = "all", keeps_sign: bool = False, uses_lambda: bool = False
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a credit function under a name, so that `RLSDConfig(credit=name)` finds it.

    The defaults promise nothing about the function and are therefore safe for any; see [`Credit`] for what the
    three promises save. The function is returned unchanged.

    Example:

    ```python
    @register_credit("half", teacher_rows="none")
    def half_credit(advantages, student_logps, teacher_logps, mask, **knobs):
        return 0.5 * advantages.unsqueeze(1).expand_as(student_logps)
    ```

    Raises:
        ValueError: the name is taken, or `teacher_rows` is none of the three.
    """
    if teacher_rows not in _TEACHER_ROWS:
        raise ValueError(f"teacher_rows={teacher_rows!r} is not one of {', '.join(map(repr, _TEACHER_ROWS))}.")

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if name in _REGISTRY:
            raise ValueError(f"A credit function named {name!r} is registered already; choose another name.")
        _REGISTRY[name] = Credit(name, function, teacher_rows, keeps_sign, uses_lambda)
        return function

    return register


def get_credit(name: str) -> Credit:
    """The credit function registered under `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"credit={name!r} is not a registered credit function. Choose one of {', '.join(sorted(_REGISTRY))}, or "
            "register your own with `trl_rlsd.register_credit` before the config is built."
        )
    return _REGISTRY[name]


def lambda_at(step: int, *, peak: float, warmup_steps: int, decay_steps: int) -> float:
    """The mixing weight lambda at an optimizer step: a line up to `peak`, then a line down to 0.

        lambda(s) = peak * s / warmup               while s < warmup
                    peak * max(1 - (s - warmup) / decay, 0)   from then on; decay = 0 keeps the peak

    With the paper's values (peak 0.5, no warm-up, decay over 50 steps) it is 0.5 at step 0, 0.25 at step 25 and 0 from
    step 50 on. Source: arXiv:2604.03128, training details.

    Units: `step` counts finished optimizer steps (`trainer.state.global_step`).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay_steps == 0:
        return peak
    return peak * max(1.0 - (step - warmup_steps) / decay_steps, 0.0)


def gain(student_logps: torch.Tensor, teacher_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the privileged context adds to each token's log-probability: teacher - student, and 0 at pads.

    A token that the reference makes likelier has a positive gain; where teacher and student read the same prompt with
    the same weights it is 0. Computed in float32 at least, without gradient.

    Shapes: all (B, T). Units: nats. Source: arXiv:2604.03128.
    """
    student_logps, teacher_logps = _at_least_float32(student_logps), _at_least_float32(teacher_logps)
    # the pads go before the subtraction: inf - inf and nan * 0 are both nan
    keep = mask.bool()
    return teacher_logps.detach().masked_fill(~keep, 0.0) - student_logps.detach().masked_fill(~keep, 0.0)


def informative(advantages: torch.Tensor, normalized: bool, negative_only: bool = False) -> torch.Tensor:
    """The rows whose advantage gives a multiplicative credit something to multiply.

    The mean of a group of equal rewards misses them by a rounding error; where TRL divides by a standard deviation of
    about 1e-4 (`normalized`), 8 rewards of 0.1 give A = -7e-5 instead of 0. `negative_only` leaves out A > 0 too.

    Shapes: (B,); returns (B,) bool.
    """
    rounding = 1e-3 if normalized else 1e-6
    return advantages < -rounding if negative_only else advantages.abs() > rounding


def clipped_weight(gains: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> tuple[torch.Tensor, ...]:
    """RLSD's multiplier exp(sign(A) * gain), and the same clipped to [1 - clip_range, 1 + clip_range].

    gain = 0 or A = 0 gives 1; with A > 0 a token that the reference supports weighs more, with A < 0 it weighs less,
    so a failed attempt's blame goes to the tokens that the reference would not have written.

    Shapes: `gains` (B, T), `advantages` (B,); returns two of (B, T). Source: arXiv:2604.03128.
    """
    exponent = (torch.sign(advantages).to(gains.dtype).unsqueeze(1) * gains).clamp(-_MAX_EXPONENT, _MAX_EXPONENT)
    weight = exponent.exp()
    return weight, weight.clamp(1.0 - clip_range, 1.0 + clip_range)


@register_credit("rlsd", teacher_rows="nonzero_advantage", keeps_sign=True, uses_lambda=True)
def rlsd_credit(
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    lam: float,
    clip_range: float,
    negative_only: bool,
) -> torch.Tensor:
    """RLSD: the verdict decides the direction, the privileged teacher the magnitude.

        A_t = A * [(1 - lam) + lam * clip(exp(sign(A) * gain_t), 1 - eps_w, 1 + eps_w)]

    lam = 0 is GRPO bit for bit, gain = 0 as well; the factor is never negative, so no token is pushed against the
    verdict. `negative_only` reweights the rows with A < 0 alone. Source: arXiv:2604.03128.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: log-probs in nats.
    """
    _, weight = clipped_weight(gain(student_logps, teacher_logps, mask), advantages, clip_range)
    if negative_only:
        weight = torch.where(advantages.unsqueeze(1) < 0, weight, torch.ones_like(weight))
    return advantages.unsqueeze(1) * ((1.0 - lam) + lam * weight)


@register_credit("grpo", teacher_rows="none", keeps_sign=True, uses_lambda=False)
def grpo_credit(
    advantages: torch.Tensor, student_logps: torch.Tensor, teacher_logps: torch.Tensor, mask: torch.Tensor, **knobs
) -> torch.Tensor:
    """GRPO: every token of a sequence gets the sequence's advantage, A_t = A.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Source: arXiv:2402.03300.
    """
    return advantages.unsqueeze(1).expand(student_logps.shape)


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
    lam: float,
    **knobs,
) -> torch.Tensor:
    """The additive hybrid of GRPO and self-distillation: A_t = A + lam * gain_t.

    lam = 0 is GRPO bit for bit. The sign is not kept: a large gain can turn the verdict over, which is what RLSD rules
    out. Source: the GRPO + OPSD baseline of arXiv:2604.03128.

    Shapes: `advantages` (B,), the others (B, T); returns (B, T). Units: nats.
    """
    return advantages.unsqueeze(1) + lam * gain(student_logps, teacher_logps, mask)


def token_advantages(
    credit: Credit,
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    scored: torch.Tensor | None = None,
    **knobs: float | bool,
) -> torch.Tensor:
    """Run a credit function and keep the laws that hold for every one of them.

    Pads get 0 whatever the log-probs hold there; rows that are not `scored` get the plain GRPO credit A; the result
    carries no gradient and is float32 at least.

    Shapes:
        `advantages` (B,); `student_logps`, `teacher_logps`, `mask` (B, T), mask 1 = counts; `scored` (B,) bool, or
        None where every row is scored. Returns (B, T).

    Raises:
        ValueError: the shapes do not fit, or the credit function returns another shape than (B, T) or a value that is
            not finite where the mask is 1.
    """
    shape = student_logps.shape
    if student_logps.ndim != 2 or teacher_logps.shape != shape or mask.shape != shape or advantages.shape != shape[:1]:
        raise ValueError(
            f"Expected advantages (B,) and student_logps, teacher_logps, mask (B, T); got {tuple(advantages.shape)}, "
            f"{tuple(shape)}, {tuple(teacher_logps.shape)}, {tuple(mask.shape)}."
        )
    advantages = _at_least_float32(advantages).detach()
    keep = mask.bool() if scored is None else mask.bool() & scored.bool().unsqueeze(1)
    student_logps = _at_least_float32(student_logps).detach().masked_fill(~keep, 0.0)
    teacher_logps = _at_least_float32(teacher_logps).detach().masked_fill(~keep, 0.0)
    with torch.no_grad():
        credited = credit.function(advantages, student_logps, teacher_logps, keep, **knobs)
    if credited.shape != shape:
        raise ValueError(f"The credit function {credit.name!r} returned {tuple(credited.shape)}, not {tuple(shape)}.")
    credited = torch.where(keep, credited, advantages.unsqueeze(1)).masked_fill(~mask.bool(), 0.0)
    if not torch.isfinite(credited).all():
        row, token = torch.nonzero(~torch.isfinite(credited))[0].tolist()
        raise ValueError(
            f"The credit function {credit.name!r} gave {credited[row, token].item()} at row {row}, token {token} "
            f"(advantage {advantages[row].item()}, student log-prob {student_logps[row, token].item()}, teacher "
            f"log-prob {teacher_logps[row, token].item()}). A model whose log-probs are not finite has diverged: "
            "lower the learning rate, or train in float32 or bfloat16 instead of float16."
        )
    return credited


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
