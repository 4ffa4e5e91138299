"""The privileged prompt: what the teacher reads in the place of the student's prompt.

    dataset row -> privileged prompt (text or messages) -> token ids, with the student's own tokenization
    teacher prompt ids + sampled completion ids -> ids and mask (B, P' + T)

The student never sees any of it. The completion's ids are appended as they were sampled: decoding and encoding them
again would change them (merges, special tokens), and with them the log-probs that are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

import torch

from trl_rlsd.texts import DISTINCTIVE_CHARACTERS, squeeze


Prompt = str | list[dict[str, Any]]


class PrivilegedPromptCollator:
    """Builds what the teacher reads.

    Args:
        template: format string with `{prompt}` exactly once and `{privileged_context}` at least once; `{{` and `}}`
            are literal braces. It is applied to the last user message, or to the whole prompt if that is plain text.
        column: the dataset column that holds the privileged context: a string or a list of messages. `None`, `""` and
            `[]` mean that the row has none.
        needs_context: whether the template must have `{privileged_context}`. Without it (an external teacher that
            reads the student's prompt) no column is read, and every row counts as having context.

    Raises:
        ValueError: the template lacks a placeholder, or has one that is unknown.
    """

    def __init__(
        self,
        template: str,
        column: str,
        *,
        needs_context: bool = True,
    ):
        self.template = template
        self.column = column
        self.before, self.after = _split_template(template, needs_context)
        self.reads_context = any(name == "privileged_context" for _, name in (*self.before, *self.after))

    def context(self, row: Mapping[str, Any], index: int = 0) -> str | None:
        """The row's privileged text, or None where it has none. A list of messages becomes text: one message its
        content, several `role: content` blocks.

        Raises:
            ValueError: the row lacks the column; the message names the row and the columns there are.
            TypeError: the column holds neither a string nor a list of messages.
        """
        return self.text(row, self.column, "privileged_column", index)

    def contexts(self, rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """The privileged texts of a batch; see `context`."""
        return [self.context(row, index) if self.reads_context else None for index, row in enumerate(rows)]

    def readable(self, row: Mapping[str, Any]) -> str | None:
        """The row's privileged text if there is one, and None without complaint if not: for GRPO, which needs none."""
        try:
            return self.text(row, self.column, "privileged_column")
        except (TypeError, ValueError):
            return None

    @staticmethod
    def text(row: Mapping[str, Any], column: str, field: str, index: int = 0) -> str | None:
        """The text of any such column, named by a config field; see `context`."""
        if column not in row:
            raise ValueError(
                f"Row {index} has no column {column!r} ({field}); it has "
                f"{', '.join(repr(name) for name in row)}. Add the column (None or '' for a row without privileged "
                f"context), or set `{field}` to the one that holds it."
            )
        value = row[column]
        if value is None or isinstance(value, str):
            return value or None
        if isinstance(value, Sequence) and all(isinstance(m, Mapping) and "content" in m for m in value):
            contents = [_text_of(message["content"], column, index) for message in value]
            if len(value) > 1:
                contents = [f"{m.get('role', 'message')}: {text}" for m, text in zip(value, contents, strict=True)]
            return "\n\n".join(contents) or None
        raise TypeError(
            f"Column {column!r} ({field}) of row {index} holds {type(value).__name__} ({value!r:.80}). "
            "It must be a string or a list of messages with 'content'; convert it, e.g. with `dataset.map`."
        )

    def prompt(self, prompt: Prompt, context: str | None) -> Prompt:
        """The teacher's prompt; the student's prompt itself, unchanged, where there is no privileged context.

        Raises:
            ValueError: a conversational prompt without a user message.
        """
        if context is None and self.reads_context:
            return prompt
        before, after = (
            "".join(literal + (context or "" if name else "") for literal, name in part)
            for part in (self.before, self.after)
        )
        if isinstance(prompt, str):
            return before + prompt + after
        users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
        if not users:
            raise ValueError(
                f"A conversational prompt needs a user message to put the privileged context into; its roles are "
                f"{[message['role'] for message in prompt]}. Add one, or use plain-text prompts."
            )
        message = prompt[users[-1]]
        content = message["content"]
        if isinstance(content, str):
            content = before + content + after
        else:  # content parts: images and texts keep their order between the two halves of the template
            content = [
                *([{"type": "text", "text": before}] if before else []),
                *content,
                *([{"type": "text", "text": after}] if after else []),
            ]
        return [*prompt[: users[-1]], {**message, "content": content}, *prompt[users[-1] + 1 :]]

    def prompts(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[bool]]:
        """The teacher's prompts of a batch, and for each whether the teacher reads more than (or, for an external
        teacher, the same as) the student, so that scoring it is of use."""
        if not self.reads_context:
            return [self.prompt(prompt, None) for prompt in prompts], [True] * len(prompts)
        contexts = self.contexts(rows)
        teacher_prompts = [self.prompt(p, context) for p, context in zip(prompts, contexts, strict=True)]
        return teacher_prompts, [context is not None for context in contexts]

    def first_and_longest(self, rows: Iterable[Mapping[str, Any]]) -> tuple[int | None, int | None]:
        """The indices of the first row with privileged context and of the one with most text (prompt and context);
        None where no row has any. Raises what `context` raises, for whichever row is bad."""
        first, longest, most = None, None, -1
        for index, row in enumerate(rows):
            context = self.context(row, index) if self.reads_context else ""
            if context is None:
                continue
            first = index if first is None else first
            size = len(context) + len(str(row["prompt"]))
            if size > most:
                longest, most = index, size
        return first, longest

    def check_rendered(self, context: str, student_text: str, teacher_text: str) -> None:
        """Refuse a teacher that cannot see the privileged text, and a student that can.

        White space and case are not compared: chat templates trim, tokenizers fold.

        Raises:
            ValueError: naming the column and what to mend.
        """
        needle, student, teacher = (squeeze(text) for text in (context, student_text, teacher_text))
        if len(needle) >= DISTINCTIVE_CHARACTERS and needle in student:
            raise ValueError(
                f"The text of {self.column!r} ({context!r:.80}) is in the student's prompt already, which reads "
                f"{student_text!r:.400}. The student would be trained to copy it: remove it from `prompt`."
            )
        if needle and teacher.count(needle) <= student.count(needle):
            raise ValueError(
                f"The text of {self.column!r} ({context!r:.80}) does not reach the teacher's prompt, which reads "
                f"{teacher_text!r:.400}. The chat template drops or rewrites it: check `teacher_prompt_template` and "
                "the tokenizer's chat template."
            )


def text_of(turns: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a prompt or a completion, without what tools wrote."""
    if isinstance(turns, str):
        return turns
    # chat templates that parse their output put the thinking into a field of its own
    parts = ("reasoning_content", "content")
    contents = [turn[part] for turn in turns if turn.get("role") != "tool" for part in parts if turn.get(part)]
    return "\n".join(
        content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)
        for content in contents
    )


def teacher_inputs(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    pad_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher prompts, padded on the left, followed by the sampled completions as they are.

    Shapes: `prompt_ids` B lists; `completion_ids`, `completion_mask` (B, T); returns ids and mask (B, P' + T), whose
    last T columns are `completion_ids` and `completion_mask`. P' is the longest prompt's length.

    Raises:
        ValueError: as many prompts as completions are needed.
    """
    if len(prompt_ids) != completion_ids.size(0):
        raise ValueError(f"{len(prompt_ids)} teacher prompts for {completion_ids.size(0)} completions.")
    ids, mask = left_padded(prompt_ids, pad_token_id, completion_ids, completion_mask)
    return torch.cat([ids, completion_ids], dim=1), torch.cat([mask, completion_mask], dim=1)


def left_padded(
    prompt_ids: Sequence[Sequence[int]], pad_token_id: int, like_ids: torch.Tensor, like_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as ids and mask (B, P'), padded on the left, with the dtypes and device of the tensors given."""
    width = max(len(ids) for ids in prompt_ids)
    padded = [[pad_token_id] * (width - len(ids)) + list(ids) for ids in prompt_ids]
    masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids]
    ids = torch.tensor(padded, dtype=like_ids.dtype, device=like_ids.device)
    return ids, torch.tensor(masks, dtype=like_mask.dtype, device=like_mask.device)


def check_length(lengths: Sequence[int], max_completion_length: int, positions: int | None) -> None:
    """Refuse teacher prompts that leave no room for the completion within the model's positions.

    Nothing is cut: a teacher that has lost the question or half of the reference scores another text.

    Units: tokens. Raises: ValueError, naming row, lengths and what to change.
    """
    if positions is None or not lengths:
        return
    longest = max(lengths)
    if longest + max_completion_length > positions:
        raise ValueError(
            f"The teacher's prompt of row {list(lengths).index(longest)} has {longest} tokens; with "
            f"max_completion_length={max_completion_length} that is more than the model's {positions} positions "
            "(max_position_embeddings). Shorten the privileged context or the prompt, drop such rows, or lower "
            "`max_completion_length`."
        )


def _split_template(template: str, needs_context: bool) -> tuple[list[tuple[str, str | None]], ...]:
    """The (literal, placeholder) pairs before and after `{prompt}`. Splitting once, instead of formatting with user
    text, is what keeps braces in prompts and contexts inert."""
    fix = "Write it like 'Reference: {privileged_context}\\n\\n{prompt}'; double the braces that are meant literally."
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"teacher_prompt_template={template!r} cannot be parsed: {error}. {fix}") from None
    names = [name for _, name, _, _ in pieces if name is not None]
    unknown = sorted(set(names) - {"prompt", "privileged_context"})
    if unknown or any(spec or conversion for _, _, spec, conversion in pieces):
        raise ValueError(
            f"teacher_prompt_template={template!r} has placeholders other than {{prompt}} and {{privileged_context}}: "
            f"{', '.join(map(repr, unknown)) or 'a conversion or format specification'}. {fix}"
        )
    if names.count("prompt") != 1:
        raise ValueError(
            f"teacher_prompt_template={template!r} must contain {{prompt}} exactly once, not {names.count('prompt')} "
            f"times. {fix}"
        )
    if needs_context and "privileged_context" not in names:
        raise ValueError(
            f"teacher_prompt_template={template!r} lacks {{privileged_context}}: the teacher would read what the "
            f"student reads. {fix} (Only teacher_model_kind='external' can do without.)"
        )
    at = [name for _, name, _, _ in pieces].index("prompt")
    before = [(literal, name) for literal, name, _, _ in pieces[:at]] + [(pieces[at][0], None)]
    return before, [(literal, name) for literal, name, _, _ in pieces[at + 1 :]]


def _text_of(content: Any, column: str, index: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "".join(part["text"] for part in content)
    raise TypeError(
        f"Column {column!r} (privileged_column) of row {index} holds a message whose content is neither a string nor "
        f"a list of text parts: {content!r:.80}."
    )
