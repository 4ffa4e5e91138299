"""Reward by reasoning-gym's own scorers, for rows of `trl_rlsd.data.reasoning_gym`."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from trl_rlsd.rewards.answer import after_thinking, final_answer
from trl_rlsd.rewards.grading import Reward
from trl_rlsd.rewards.pool import run_all


_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_REMARK = re.compile(r"\.(?:\s|$)|\s\(")
# reasoning-gym 0.1.25: these scorers evaluate the answer as Python, itself or through sympy
EVALUATED = frozenset(
    ("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
     "simple_integration", "spiral_matrix", "string_insertion")
)  # fmt: skip
_HARMLESS = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Constant, ast.Name, ast.Load, ast.List,
    ast.Tuple, ast.Call,
)  # fmt: skip
_FUNCTIONS = frozenset(
    ("Abs", "acos", "acosh", "acot", "asin", "asinh", "atan", "atanh", "cos", "cosh", "cot", "csc", "exp", "ln", "log",
     "sec", "sin", "sinh", "sqrt", "tan", "tanh")
)  # fmt: skip


@dataclass(frozen=True)
class ReasoningGymReward(Reward):
    """The scorer's verdict on each completion's answer; 1 is right. Scorers may give partial credit.

    The answer is the last `<answer>...</answer>`, else what is boxed or stated ("the answer is"), else, where the
    reference is a number, the last number in the text, else the whole text. Only what follows a thinking block is
    read. Ask for the tags in a system prompt: many tasks' answers are several lines.

    Some scorers evaluate the answer as Python. There, an answer that is more than numbers, names, lists, arithmetic
    and elementary functions is wrong, and never reaches the scorer.

    Args:
        partial: keep the scorers' partial credit. Some give it lightly, such as half of the points for naming both
            options. With False, an answer that has not the full score has 0.
        timeout: seconds to score one completion; one that takes longer has no reward.
        workers: processes to score in. [the cores]
    """

    partial: bool = True
    timeout: float = 10.0
    workers: int | None = None

    kind: ClassVar[str] = "reasoning_gym"
    packages: ClassVar[tuple[str, ...]] = ("reasoning_gym", "pebble", "loky")

    @property
    def required_columns(self) -> tuple[str, ...]:
        return ("reasoning_gym",)

    def grade_all(self, texts: list[str], rows: list[dict[str, Any]]) -> list[float | Exception]:
        calls = [(text, row["reasoning_gym"]) for text, row in zip(texts, rows, strict=True)]
        scores = run_all(_score, calls, timeout=self.timeout, workers=self.workers, imports=("reasoning_gym",))
        return scores if self.partial else [s if isinstance(s, Exception) else float(s >= 1.0) for s in scores]


def _score(text: str, problem: str) -> float:
    return score(text, json.loads(problem))


def score(text: str, entry: dict[str, Any]) -> float:
    """reasoning-gym's score of a completion's text for one problem (an entry of its datasets)."""
    task, rest = entry["metadata"]["source_dataset"], after_thinking(text)
    answer = None if rest is None else extract_answer(rest, str(entry["answer"]))
    if answer is not None and task in EVALUATED and not is_harmless(answer):
        return 0.0
    return float(_scorer(task)(answer, entry))


def is_harmless(answer: str) -> bool:
    """Whether an answer, evaluated as Python, can do nothing but compute."""
    try:
        nodes = list(ast.walk(ast.parse(answer.strip(), mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        # rows of a matrix or a board are no Python
        return re.fullmatch(r"[\w\s.,+*/^-]*", answer) is not None and "__" not in answer
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    return (
        all(isinstance(node, _HARMLESS) for node in nodes)
        and all(isinstance(function, ast.Name) and function.id in _FUNCTIONS for function in called)
        and not any(isinstance(node, ast.Name) and "__" in node.id for node in nodes)
        # sympy evaluates a text in an expression once more
        and all(re.fullmatch(r"[\w\s.]*", str(node.value)) for node in nodes if isinstance(node, ast.Constant))
    )


def extract_answer(text: str, reference: str) -> str | None:
    """What of a completion is compared with a reference; None where there is nothing."""
    from reasoning_gym.utils import extract_answer as tagged_answer

    tagged = tagged_answer(text)
    if tagged is not None:
        return tagged
    stated = final_answer(text)
    if not _NUMBER.fullmatch(reference):
        return (stated.strip("*$ ") if stated else text.strip()) or None
    # what follows the answer's sentence, or stands in brackets behind it, is no part of it
    return (last_number(_REMARK.split(stated)[0]) if stated else None) or last_number(text)


def last_number(text: str) -> str | None:
    """The last number in a text, None where there is none: the `contrast_reference` of tasks with numbers."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


@cache
def _scorer(name: str):
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(name)


reasoning_gym_reward = ReasoningGymReward()
