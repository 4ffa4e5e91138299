"""Reward of mathematical answers, by math-verify (https://github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

from trl_rlsd.rewards.answer import after_thinking, final_answer
from trl_rlsd.rewards.grading import CannotGrade, Reward
from trl_rlsd.rewards.pool import run_all
from trl_rlsd.texts import squeeze


# an answer stands at the end; math-verify's patterns are slow on a megabyte
_READ = 4000
# computer algebra takes letters for factors: `east` would equal `seat`
_WORDS = re.compile(r"[A-Za-z]{2,}(\s+[A-Za-z]+)*")
# between the digits of a number; math-verify would read 12\,345 as a sum
_HEDGE = re.compile(r"\\(?:lor|vee|implies)\b|\\\\|\bor\b")
_BINOMIAL = re.compile(r"\\[dt]?binom|\\choose\b")
# 18 dollars: LaTeX has letters for factors; of one letter, math-verify knows which are units
_COUNTED = re.compile(r"(\$?[-+]?\d[\d,]*(?:\.\d+)?%?)\$?(?:\s+(?!pi\b|sqrt\b)[A-Za-z]{2,})+")
_THIN_SPACE = re.compile(r"\\[,!]")


@dataclass(frozen=True)
class MathReward(Reward):
    """1 where a completion's final answer equals the reference mathematically, else 0.

    Numbers, fractions, percentages, sets, intervals, tuples, equations and units, in LaTeX or plain text; of several
    answers the last one in a box counts, without a box the last one. Only what follows a thinking block is read.

    Args:
        column: of the reference: an answer, or a solution that ends with one (in a box, or behind `####`).
        timeout: seconds to judge one completion; a completion that takes longer has no reward.
        exact_fallback: where math-verify cannot read the reference, compare texts without spaces and case. Without
            it, such a row has no reward.
        workers: processes to judge in. [the cores]
    """

    column: str = "answer"
    timeout: float = 5.0
    exact_fallback: bool = False
    workers: int | None = None

    kind: ClassVar[str] = "math"
    packages: ClassVar[tuple[str, ...]] = ("math_verify", "pebble", "loky")

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def grade_all(self, texts: list[str], rows: list[dict[str, Any]]) -> list[float | Exception]:
        calls = [
            (text[-10 * _READ :], str(row[self.column]), self.exact_fallback)
            for text, row in zip(texts, rows, strict=True)
        ]
        return run_all(grade, calls, timeout=self.timeout, workers=self.workers, imports=("math_verify",))


def grade(text: str, reference: str, exact_fallback: bool = False) -> float:
    """See [`MathReward`]. Can hang: some expressions are too large to evaluate.

    Raises: CannotGrade, where the reference has no expression.
    """
    text = after_thinking(text)
    if text is None:
        return 0.0
    right, stated = final_answer(reference) or reference, final_answer(text)
    verdict = _equal(right, stated) if stated else _equal(right, text[-_READ:], bare=False)
    if verdict is not None:
        return float(verdict)
    if not exact_fallback:
        raise CannotGrade(f"math-verify finds no expression in the reference {reference[:80]!r}")
    return float(squeeze(stated or text) == squeeze(right))


# completions of a group share their reference, and often their answer
@lru_cache(maxsize=4096)
def _equal(right: str, found: str, bare: bool = True) -> bool | None:
    """Whether an answer, or a text with one in it, equals the right one; None where that has no expression."""
    from math_verify import verify

    gold = [] if _WORDS.fullmatch(right.strip()) else _expressions(right)
    if not gold:
        return None
    if bare and (_HEDGE.search(found) and not _HEDGE.search(right)):
        return False
    answer = _expressions(found) if bare else _parse(found)
    if bare and getattr(gold[0], "is_Rational", False) and (_BINOMIAL.search(found) or not _is_number(answer)):
        return False
    # limits of time are the caller's: math-verify's own work in a main thread only
    return verify(gold, answer, timeout_seconds=None)


def _is_number(answer: list) -> bool:
    """Whether an answer is a number written out, not a sum or product that is still to be worked out: a question's own
    `17 \\times 3` is no answer to it."""
    from sympy import Add, Integer, Mul, NumberSymbol, Pow, Rational, UnevaluatedExpr, preorder_traversal
    from sympy.core.relational import Relational

    if not answer or isinstance(answer[0], str):
        return True  # nothing, or a text: not equal to a number anyway
    tree = answer[0].rhs if isinstance(answer[0], Relational) else answer[0]
    known = (Add, Mul, Pow, NumberSymbol, Rational, UnevaluatedExpr)
    for node in preorder_traversal(tree):
        if not isinstance(node, known) and not any(getattr(node, kind, False) for kind in ("is_Number", "is_Symbol")):
            return False
        factors = [f for f in node.args if isinstance(f, Integer) and abs(f) != 1] if isinstance(node, Mul) else []
        mixed = isinstance(node, Add) and sorted(type(part) is Integer for part in node.args) == [False, True]
        if len(factors) > 1 or (isinstance(node, Add) and not (mixed and all(p.is_Rational for p in node.args))):
            return False
    return True


@lru_cache(maxsize=4096)
def _expressions(answer: str) -> list:
    """Of a text that is an answer and nothing else. In a box it is LaTeX to math-verify: of a bare `3\\sqrt{2}` or
    `[0, 1)` it would take one number."""
    answer = _THIN_SPACE.sub("", answer[:_READ]).strip().strip("$").strip()
    if counted := _COUNTED.fullmatch(answer):
        answer = counted[1]
    return _parse(f"\\boxed{{{answer}}}") or _parse(answer)


@cache
def _quiet() -> None:
    """math-verify warns at every call without a time limit of its own."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parse(text: str) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    _quiet()
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, extraction_config=configs, parsing_timeout=None)


math_reward = MathReward()
