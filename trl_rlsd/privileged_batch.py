"""What the teacher reads for one generation batch.

    rows -> contexts of the column -> (rollouts, rewards) -> contexts of environments -> the teacher's prompts

All that a dataset says is read and checked before anything is generated. What an environment says comes when its
rollout is over and paid for: a context that does not fit is then left out instead of refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_rlsd.collator import PrivilegedPromptCollator
from trl_rlsd.context import Context, environment_context, gives_context, text_in
from trl_rlsd.data import CUT_COLUMN
from trl_rlsd.images import TeacherPrompts
from trl_rlsd.prompt_check import PromptCheck


class PrivilegedBatch:
    """
    Args:
        rows: the dataset rows of this process, one a rollout.
        collator, check: the trainer's.

    Attributes:
        prompts: those that the student reads, once they are known.
        contexts: of each row, None without any; None before they were read.
        contrast: the prompts with wrong references, once `wrong` has made some.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], collator: PrivilegedPromptCollator, check: PromptCheck):
        self.rows, self.collator, self.check = rows, collator, check
        self.prompts: list = []
        self.contexts: list[Context | None] | None = None
        self.images_by_tools = [False] * len(rows)
        self._late: list[Any] = [None] * len(rows)
        self._teacher: TeacherPrompts | None = None
        self.contrast: TeacherPrompts | None = None

    def read(self, prompts: list, environments: Sequence[Any] | None) -> None:
        """The prompts are known, nothing is sampled yet. Raises: ValueError, TypeError, for what cannot be right."""
        self.prompts = prompts
        if environments is not None and self.collator.reads_context:
            self._late = [own if gives_context(own) else None for own in environments]
        rows = enumerate(zip(self.rows, self._late, strict=True))
        reads = self.collator.reads_context
        self.contexts = [self.collator.context(row, i) if reads and late is None else None for i, (row, late) in rows]
        self._teacher = self.check.batch(self.contexts, prompts)

    def ask_environments(self) -> None:
        """The rollouts are over and rewarded: environments say what they know."""
        for row, environment in enumerate(self._late):
            if environment is not None:
                self.contexts[row] = environment_context(environment, images=self.collator.images)
                self._teacher = None  # its prompts are made anew

    def column(self, name: str, field: str) -> list[Context | None]:
        """Another column with references, named by a config field."""
        return [self.collator.read(row, name, field, index) for index, row in enumerate(self.rows)]

    @property
    def cut(self) -> dict[str, tuple[int, int]]:
        """How much `load_rows` has cut off the rows' documents, as a metric; nothing where it has made none."""
        counts = [row[CUT_COLUMN] or 0 for row in self.rows if CUT_COLUMN in row]
        return {CUT_COLUMN: (sum(counts), len(counts))} if counts else {}

    @property
    def texts(self) -> list[str | None]:
        """The privileged text of each row, for diagnostics; None where there is none, or none was read."""
        if self.contexts is None or not self.collator.reads_context:
            return list(map(self.collator.readable, self.rows))
        return list(map(text_in, self.contexts))

    @property
    def right(self) -> list[str | None]:
        """The text of each right reference."""
        return list(map(text_in, self.contexts))

    @property
    def teacher(self) -> TeacherPrompts:
        """What the teacher reads, and which rows are of use to score: not those to whose student a tool has shown
        images, which are part of the completion."""
        if self._teacher is None:
            self._teacher = self.check.late(self.contexts, self.prompts)
            self.check.show(self.contexts, self.prompts, self._teacher)
        useful = [u and not shown for u, shown in zip(self._teacher.useful, self.images_by_tools, strict=True)]
        return TeacherPrompts(self._teacher.ids, self._teacher.images, useful)

    def wrong(self, references: Sequence[Context | None]) -> TeacherPrompts:
        """The same prompts with wrong references."""
        self.contrast = self.check.late(references, self.prompts)
        return self.contrast
