"""The self-check of the prompts: before anything is generated, what the teacher will read is rendered, shown once, and
refused if it cannot be right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_rlsd.collator import PrivilegedPromptCollator, check_length


logger = get_logger(__name__)


class PromptCheck:
    """
    Args:
        collator: builds the teacher's prompts.
        tokenize: prompts -> token ids, as the trainer tokenizes the student's.
        tokenizer: decodes them.
        max_completion_length: tokens that must fit behind a prompt.
        positions: the model's, None if it has no limit.
    """

    def __init__(
        self,
        collator: PrivilegedPromptCollator,
        tokenize: Callable[[list], list[list[int]]],
        tokenizer: PreTrainedTokenizerBase,
        max_completion_length: int,
        positions: int | None,
    ):
        self.collator = collator
        self.tokenize = tokenize
        self.tokenizer = tokenizer
        self.max_completion_length = max_completion_length
        self.positions = positions
        self.shown = False
        self._rollout_checked = False

    def dataset(self, dataset: Dataset) -> None:
        """At the start: the first row with privileged context is rendered and shown, and the row with most text must
        fit into the model. Raises: ValueError, TypeError."""
        rows = dataset.select_columns([c for c in ("prompt", self.collator.column) if c in dataset.column_names])
        first, longest = self.collator.first_and_longest(rows)
        if first is None:
            logger.warning(
                f"No row of the dataset has privileged context in {self.collator.column!r}: every row will be "
                "trained with plain GRPO credit."
            )
            return
        prompts, _ = self.collator.prompts([rows[longest]], [rows[longest]["prompt"]])
        self._check_lengths(self.tokenize(prompts))
        prompt = [rows[first]["prompt"]]
        teacher_prompts, _ = self.collator.prompts([rows[first]], prompt)
        self._show(rows[first], self.tokenize(prompt)[0], self.tokenize(teacher_prompts)[0])

    def batch(self, rows: Sequence[Mapping[str, Any]], prompts: list) -> tuple[list[list[int]], list[bool]]:
        """The teacher's prompt ids of a batch, and for each row whether scoring it is of use. `prompts` are those that
        the student will read. Raises: ValueError, TypeError."""
        teacher_prompts, has_context = self.collator.prompts(rows, prompts)
        teacher_ids = self.tokenize(teacher_prompts)
        self._check_lengths(teacher_ids)
        if not self.shown and any(has_context):
            first = has_context.index(True)
            self._show(rows[first], self.tokenize(prompts)[first], teacher_ids[first])
        return teacher_ids, has_context

    def wrong(self, prompts: list, references: Sequence[str | None]) -> tuple[list[list[int]], list[bool]]:
        """The prompt ids with wrong references in the place of the right ones, and for each row whether it has one
        that fits into the model. The lengths are not known before sampling, so that one too long is left out."""
        # all rows: with environments TRL pairs the prompts that it tokenizes with the batch's environments
        ids = self.tokenize([self.collator.prompt(p, r) for p, r in zip(prompts, references, strict=True)])
        room = math.inf if self.positions is None else self.positions - self.max_completion_length
        return ids, [r is not None and len(own) <= room for r, own in zip(references, ids, strict=True)]

    def rollout(self, prompts: list, rollout_ids: Sequence[Sequence[int]]) -> None:
        """Warn, once, of a `rollout_func` that samples from another prompt than the trainer renders."""
        if self._rollout_checked:
            return
        self._rollout_checked = True
        if any(list(a) != list(b) for a, b in zip(rollout_ids, self.tokenize(prompts), strict=True)):
            logger.warning(
                "`rollout_func` samples from another prompt than the one that the trainer renders. The teacher reads "
                "the trainer's, so the gain also measures that difference: render the prompt in `rollout_func` as "
                "the trainer does (same chat template, tools and chat_template_kwargs)."
            )

    def _check_lengths(self, prompt_ids: Sequence[Sequence[int]]) -> None:
        check_length([len(ids) for ids in prompt_ids], self.max_completion_length, self.positions)

    def _show(self, row: Mapping[str, Any], student_ids: list[int], teacher_ids: list[int]) -> None:
        self.shown = True
        student, teacher = self.tokenizer.decode(student_ids), self.tokenizer.decode(teacher_ids)
        if self.collator.reads_context:
            # encoded and decoded like the prompts, so that what a tokenizer drops is dropped here too
            context = self.tokenizer.encode(self.collator.context(row), add_special_tokens=False)
            self.collator.check_rendered(self.tokenizer.decode(context), student, teacher)
        logger.info(f"The student reads:\n{student}\nThe teacher reads:\n{teacher}")
