"""Credit functions by name, and the laws that hold for every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trl_rlsd.credit.gain import at_least_float32


@dataclass(frozen=True)
class Credit:
    """A registered credit function and what a trainer must know to run it.

    Attributes:
        name: what `RLSDConfig(credit=...)` says.
        function: the credit function; see the package's docstring for its form.
        teacher_rows: the rows that need a teacher's log-probs: `"nonzero_advantage"`, where A = 0 gives no credit
            whatever the teacher says; `"positive_advantage"`, where A > 0 alone is touched; `"all"`; or `"none"`: the
            function then gets the student's log-probs as the teacher's (gain 0), and the dataset needs no privileged
            column.
        keeps_sign: whether every token's credit has the sign of its sequence's advantage, or is 0.
        uses_lambda: whether lambda = 0 makes it plain GRPO, so that the teacher can be left out then.
        contrast: whether it reads `wrong_logps`, a second teacher pass with a wrong reference.
        evidence: what the clipped weight is taken of, for metrics and pictures: `"gain"`, `"reversed"` (minus the
            gain), `"contrast"`; None: there is no such weight; `"gate"`: none either, but every token gets a share of
            A, from 1 - lambda where the gate is closed to 1.
        reads: per-token tensors (B, T) beyond log-probs that it takes as keywords, by name: what the trainer's
            `token_labels` returns.
    """

    name: str
    function: Callable[..., torch.Tensor]
    teacher_rows: str
    keeps_sign: bool
    uses_lambda: bool
    contrast: bool = False
    evidence: str | None = None
    reads: tuple[str, ...] = ()


_TEACHER_ROWS = ("nonzero_advantage", "positive_advantage", "all", "none")
_REGISTRY: dict[str, Credit] = {}


def register_credit(
    name: str,
    *,
    teacher_rows: str = "all",
    keeps_sign: bool = False,
    uses_lambda: bool = False,
    contrast: bool = False,
    evidence: str | None = None,
    reads: tuple[str, ...] = (),
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a credit function under a name, so that `RLSDConfig(credit=name)` finds it.

    The defaults promise nothing about the function and are therefore safe for any; see [`Credit`] for what the
    promises save. A function that breaks `keeps_sign` is stopped with an error. It is returned unchanged.

    Example:

    ```python
    @register_credit("half", teacher_rows="none")
    def half_credit(advantages, student_logps, teacher_logps, mask, **knobs):
        return 0.5 * advantages.unsqueeze(1).expand_as(student_logps)
    ```

    Raises:
        ValueError: the name is taken, `teacher_rows` or `evidence` is unknown or a gate's promises are missing,
            `reads` is no tuple, or `contrast` without a teacher.
    """
    if teacher_rows not in _TEACHER_ROWS:
        raise ValueError(f"teacher_rows={teacher_rows!r} is not one of {', '.join(map(repr, _TEACHER_ROWS))}.")
    if evidence not in (None, "gain", "reversed", "contrast", "gate"):
        raise ValueError(f"evidence={evidence!r} is not one of 'gain', 'reversed', 'contrast', 'gate', None.")
    if evidence == "gate" and not (keeps_sign and uses_lambda):
        raise ValueError("evidence='gate' is a share of A that lambda bounds; give keeps_sign and uses_lambda, too.")
    if isinstance(reads, str):
        raise ValueError(f"reads={reads!r} is one string; give a tuple of names, ({reads!r},).")
    if contrast and teacher_rows == "none":
        raise ValueError("contrast=True needs a teacher; give teacher_rows='all' or another than 'none'.")

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if name in _REGISTRY:
            raise ValueError(f"A credit function named {name!r} is registered already; choose another name.")
        _REGISTRY[name] = Credit(name, function, teacher_rows, keeps_sign, uses_lambda, contrast, evidence, reads)
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


def token_advantages(
    credit: Credit,
    advantages: torch.Tensor,
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    scored: torch.Tensor | None = None,
    **knobs,
) -> torch.Tensor:
    """Run a credit function and keep the laws that hold for every one of them.

    Pads get 0 whatever the log-probs hold there; rows and tokens that are not `scored` get the plain GRPO credit A;
    the result carries no gradient and is float32 at least. Tensors among the `knobs` (`wrong_logps`) are treated like
    the other log-probs.

    Shapes:
        `advantages` (B,); `student_logps`, `teacher_logps`, `mask`, `wrong_logps` (B, T), mask 1 = counts; `scored`
        (B,) or (B, T) bool, or None where everything is scored. Returns (B, T).

    Raises:
        ValueError: the shapes do not fit, or the credit function returns another shape than (B, T), a value that is
            not finite where the mask is 1, or one against its advantage's sign although it is registered as keeping
            that; the message names the function, the row and the token.
    """
    shape = student_logps.shape
    if student_logps.ndim != 2 or teacher_logps.shape != shape or mask.shape != shape or advantages.shape != shape[:1]:
        raise ValueError(
            f"Expected advantages (B,) and student_logps, teacher_logps, mask (B, T); got {tuple(advantages.shape)}, "
            f"{tuple(shape)}, {tuple(teacher_logps.shape)}, {tuple(mask.shape)}."
        )
    advantages = at_least_float32(advantages).detach()
    keep = mask.bool()
    if scored is not None:
        keep = keep & (scored if scored.ndim == 2 else scored.unsqueeze(1)).bool()

    def clean(logps: torch.Tensor) -> torch.Tensor:
        return at_least_float32(logps).detach().masked_fill(~keep, 0.0)

    student_logps, teacher_logps = clean(student_logps), clean(teacher_logps)
    if "wrong_logps" in knobs:
        knobs["wrong_logps"] = clean(knobs["wrong_logps"])
    with torch.no_grad():
        credited = credit.function(advantages, student_logps, teacher_logps, keep, **knobs)
    if credited.shape != shape:
        raise ValueError(f"The credit function {credit.name!r} returned {tuple(credited.shape)}, not {tuple(shape)}.")
    credited = torch.where(keep, credited, advantages.unsqueeze(1)).masked_fill(~mask.bool(), 0.0)
    _check(credit, credited, advantages, student_logps, teacher_logps)
    return credited


def _check(credit, credited, advantages, student_logps, teacher_logps) -> None:
    broken = ~torch.isfinite(credited)
    if broken.any():
        # a function that looks along the row spoils all of it: name the token that it comes from
        source = broken & ~(torch.isfinite(student_logps) & torch.isfinite(teacher_logps))
        row, token = torch.nonzero(source if source.any() else broken)[0].tolist()
        raise ValueError(
            f"The credit function {credit.name!r} gave {credited[row, token].item()} at row {row}, token {token} "
            f"(advantage {advantages[row].item()}, student log-prob {student_logps[row, token].item()}, teacher "
            f"log-prob {teacher_logps[row, token].item()}). A model whose log-probs are not finite has diverged: "
            "lower the learning rate, or train in float32 or bfloat16 instead of float16."
        )
    turned = credited * advantages.unsqueeze(1) < 0
    if credit.keeps_sign and turned.any():
        row, token = turned.nonzero()[0].tolist()
        raise ValueError(
            f"The credit function {credit.name!r} is registered with keeps_sign=True, but gave "
            f"{credited[row, token].item()} at row {row}, token {token}, whose advantage is {advantages[row].item()}. "
            "Register it without keeps_sign, or keep the sign."
        )


def mean_one(credited: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rescale the credit of each row's masked tokens so that their mean is the sequence's advantage again: credit is
    moved between them, and none is added or taken away.

    A row without credit, or with A = 0, stays as it is, as do the tokens that are not masked. For a credit that keeps
    the sign.

    Shapes: `credited`, `mask` (B, T), `advantages` (B,); returns (B, T).
    """
    keep = mask.bool()
    total = credited.masked_fill(~keep, 0.0).sum(1, keepdim=True)
    wanted = advantages.to(credited.dtype).unsqueeze(1) * keep.sum(1, keepdim=True)
    factor = torch.where(total != 0, wanted / total, torch.ones_like(total))
    return torch.where(keep, credited * factor, credited)
