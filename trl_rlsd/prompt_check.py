"""The self-check of the prompts: before anything is generated, what the teacher will read is rendered, shown once, and
refused if it cannot be right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_rlsd.collator import PrivilegedPromptCollator, check_length
from trl_rlsd.context import Context, texts_in
from trl_rlsd.images import RowImages, TeacherPrompts, prompt_with_images
from trl_rlsd.texts import collapse


logger = get_logger(__name__)


class PromptCheck:
    """
    Args:
        collator: builds the teacher's prompts.
        tokenize: prompts -> token ids and images, as the trainer tokenizes the student's.
        tokenizer: decodes them.
        max_completion_length: tokens that must fit behind a prompt.
        positions: the model's, None if it has no limit.
    """

    def __init__(
        self,
        collator: PrivilegedPromptCollator,
        tokenize: Callable[[list], tuple[list[list[int]], list[RowImages | None]]],
        tokenizer: PreTrainedTokenizerBase,
        max_completion_length: int,
        positions: int | None,
    ):
        self.collator = collator
        self.tokenize = tokenize
        self.tokenizer = tokenizer
        self.max_completion_length = max_completion_length
        self.positions = positions
        self.shown: str | None = None  # what was shown, once it was
        self._rollout_checked = False

    def dataset(self, dataset: Dataset) -> None:
        """At the start: the first row with privileged context is rendered and shown, and the row with most text must
        fit into the model. Raises: ValueError, TypeError."""
        rows = dataset.select_columns([c for c in ("prompt", self.collator.column) if c in dataset.column_names])
        if "Image(" in repr(rows.features):  # text alone is looked at: no image is decoded for it
            tables = rows.with_format("arrow").iter(batch_size=256)
            rows = (row for table in tables for row in table.to_pylist())
        first, longest = self.collator.first_and_longest(rows)
        if first is None:
            logger.warning(
                f"No row of the dataset has privileged context in {self.collator.column!r}: every row will be "
                "trained with plain GRPO credit."
            )
            return
        for index in (longest, first):
            row = dataset[index]
            prompts, contexts = [prompt_with_images(row)], self.collator.contexts([row])
            ids = self.tokenize(self.collator.prompts(contexts, prompts)[0])[0]
            self._check_lengths(ids)
        self._show(contexts[0], self.tokenize(prompts)[0][0], ids[0])

    def batch(self, contexts: Sequence[Context | None], prompts: list) -> TeacherPrompts:
        """The teacher's prompts of a batch. `prompts` are those that the student will read. Raises: ValueError,
        TypeError."""
        teacher_prompts, useful = self.collator.prompts(contexts, prompts)
        ids, images = self.tokenize(teacher_prompts)
        self._check_lengths(ids)
        teacher = TeacherPrompts(ids, images, useful)
        self.show(contexts, prompts, teacher)
        return teacher

    def late(self, contexts: Sequence[Context | None], prompts: list) -> TeacherPrompts:
        """The prompts with contexts that are known only once completions have been sampled: a wrong sibling's, an
        environment's. What does not fit into the model is then left out, so that nothing paid for is lost."""
        # all rows: with environments TRL pairs the prompts that it tokenizes with the batch's environments
        ids, images = self.tokenize([self.collator.prompt(p, c) for p, c in zip(prompts, contexts, strict=True)])
        room = math.inf if self.positions is None else self.positions - self.max_completion_length
        fits = [c is not None and len(own) <= room for c, own in zip(contexts, ids, strict=True)]
        return TeacherPrompts(ids, images, fits)

    def rollout(self, prompts: list, rollout_ids: Sequence[Sequence[int]]) -> None:
        """Warn, once, of a `rollout_func` that samples from another prompt than the trainer renders."""
        if self._rollout_checked:
            return
        self._rollout_checked = True
        if any(list(a) != list(b) for a, b in zip(rollout_ids, self.tokenize(prompts)[0], strict=True)):
            logger.warning(
                "`rollout_func` samples from another prompt than the one that the trainer renders. The teacher reads "
                "the trainer's, so the gain also measures that difference: render the prompt in `rollout_func` as "
                "the trainer does (same chat template, tools and chat_template_kwargs)."
            )

    def show(self, contexts: Sequence[Context | None], prompts: list, teacher: TeacherPrompts) -> None:
        """Show and check the first row that the teacher reads more of; once. Raises: ValueError."""
        if not self.shown and any(teacher.useful):
            first = teacher.useful.index(True)
            self._show(contexts[first], self.tokenize(prompts)[0][first], teacher.ids[first])

    def _check_lengths(self, prompt_ids: Sequence[Sequence[int]]) -> None:
        check_length([len(ids) for ids in prompt_ids], self.max_completion_length, self.positions)

    def _show(self, context: Context | None, student_ids: list[int], teacher_ids: list[int]) -> None:
        student, teacher = self.tokenizer.decode(student_ids), self.tokenizer.decode(teacher_ids)
        for text in texts_in(context) if self.collator.reads_context else ():
            # encoded and decoded like the prompts, so that what a tokenizer drops is dropped here too
            decoded = self.tokenizer.decode(self.tokenizer.encode(text, add_special_tokens=False))
            self.collator.check_rendered(decoded, student, teacher)
        self.shown = f"The student reads:\n{collapse(student)}\nThe teacher reads:\n{collapse(teacher)}"
        logger.info(self.shown)
