"""What every reward does alike: columns and completions in TRL's form -> one grade for each completion, in order.

A grade is a number; None says that there was nothing to compare with, or that the grader itself failed. The two
differ: failures are logged and counted. A wrong, empty or harmful answer is neither: it is a wrong answer, 0.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar


logger = logging.getLogger(__name__)


class CannotGrade(Exception):
    """The grader could not judge: a reference that it cannot read, a sandbox that is gone. The message says why."""


@dataclass(frozen=True)
class Reward(ABC):
    """A reward function whose options are its fields; picklable, and safe to call in any thread.

    It is called as TRL calls reward functions: `reward(prompts, completions, **columns) -> list[float | None]`, with
    plain or conversational completions; of a conversation, the last message is graded. `log_metric`, where TRL gives
    it, gets `{kind}_failures`, the completions that the grader failed on.
    """

    kind: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()

    @property
    def __name__(self) -> str:  # what TRL logs it as
        return f"{self.kind}_reward"

    @property
    @abstractmethod
    def required_columns(self) -> tuple[str, ...]:
        """The dataset's columns without which there is nothing to compare with; a row with None in the first of them
        is left to other rewards. Without any, every row is graded."""

    def check(self) -> None:
        """Asked before anything is generated. Raises: ImportError, naming what to install."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            raise ImportError(
                f"{self.__name__} needs {', '.join(missing)}, which is not installed: pip install 'trl-rlsd[rewards]'"
            )

    @abstractmethod
    def grade_all(self, texts: list[str], rows: list[dict[str, Any]]) -> list[float | Exception]:
        """The grade of each text, with its row of all columns; an exception where the grader failed."""

    def __call__(
        self,
        prompts: Sequence[Any] | None,
        completions: Sequence[str | list[dict[str, Any]]],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Raises:
            ValueError: a required column is missing; the message lists those that there are.
        """
        per_row = {name: values for name, values in columns.items() if _is_column(values, len(completions))}
        check_columns(self, per_row)
        rows = [{name: values[i] for name, values in per_row.items()} for i in range(len(completions))]
        first = self.required_columns[:1]
        graded = [i for i, row in enumerate(rows) if all(row[name] is not None for name in first)]
        texts = [completion_text(completions[i]) for i in graded]
        rewards: list[float | None] = [None] * len(rows)
        failures: list[Exception] = []
        for i, grade in zip(graded, self.grade_all(texts, [rows[i] for i in graded]), strict=True):
            if isinstance(grade, Exception):
                failures.append(grade)
            else:
                rewards[i] = float(grade)
        if failures:
            logger.warning(
                "%s failed on %d of %d completions; they have no reward. The first: %s: %s",
                self.__name__, len(failures), len(rows), type(failures[0]).__name__, failures[0],
            )  # fmt: skip
        if log_metric is not None:
            log_metric(f"{self.kind}_failures", len(failures))
        return rewards


def check_columns(reward: Any, columns: Collection[str]) -> None:
    """Raises: ValueError, where rows with these columns lack one of the reward's `required_columns`, if it has any."""
    if missing := [name for name in getattr(reward, "required_columns", ()) if name not in columns]:
        raise ValueError(
            f"{reward.__name__} needs the column {missing[0]!r}, which the rows do not have; their columns are "
            f"{', '.join(map(repr, columns)) or 'none'}. Rename one of them, or name it in the reward's options."
        )


def one_by_one(grade: Callable[[str, dict], float], texts: list[str], rows: list[dict]) -> list[float | Exception]:
    """Grade in this process, for graders that cannot hang."""
    return [grade_or_error(grade, text, row) for text, row in zip(texts, rows, strict=True)]


def grade_or_error(grade: Callable[..., float], *arguments: Any) -> float | Exception:
    """A grade, or why there is none."""
    try:
        return grade(*arguments)
    except Exception as error:
        return error


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion: its own, or that of its last message; "" where it has none, or a tool wrote it (TRL
    1.16 ends a completion so where the tool's text has left no room for another turn)."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {}
    content = last.get("content") if last.get("role") != "tool" else None
    if isinstance(content, list):  # parts, as of vision-language models
        content = "".join(part.get("text") or "" for part in content)
    return content or ""


def _is_column(values: Any, rows: int) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) == rows
