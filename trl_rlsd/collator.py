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

from trl_rlsd.context import Context, images_in, merged, opened, read_context, text_in
from trl_rlsd.texts import DISTINCTIVE_CHARACTERS, squeeze


Prompt = str | list[dict[str, Any]]


class PrivilegedPromptCollator:
    """Builds what the teacher reads.

    Args:
        template: format string with `{prompt}` exactly once and `{privileged_context}` at least once; `{{` and `}}`
            are literal braces. It is applied to the last user message, or to the whole prompt if that is plain text.
        column: the dataset column that holds the privileged context: a string, or a list of messages, whose content
            may have images where the model reads some. `None`, `""` and `[]` mean that the row has none.
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
        self.images = False  # whether contexts may have images; the trainer knows once it has a processor

    def context(self, row: Mapping[str, Any], index: int = 0) -> Context | None:
        """The row's privileged context, None where it has none; see [`read_context`].

        Raises:
            ValueError: the row lacks the column; the message names the row and the columns there are.
            TypeError: the column holds neither a string nor a list of messages.
        """
        return self.read(row, self.column, "privileged_column", index)

    def contexts(self, rows: Sequence[Mapping[str, Any]]) -> list[Context | None]:
        """The privileged contexts of a batch; see `context`."""
        return [self.context(row, index) if self.reads_context else None for index, row in enumerate(rows)]

    def readable(self, row: Mapping[str, Any]) -> str | None:
        """The row's privileged text if there is one, and None without complaint if not: for GRPO, which needs none."""
        try:
            return text_in(self.context(row))
        except (TypeError, ValueError):
            return None

    def read(self, row: Mapping[str, Any], column: str, field: str, index: int = 0) -> Context | None:
        """What any such column holds, named by a config field; see `context`."""
        if column not in row:
            raise ValueError(
                f"Row {index} has no column {column!r} ({field}); it has "
                f"{', '.join(repr(name) for name in row)}. Add the column (None or '' for a row without privileged "
                f"context), or set `{field}` to the one that holds it."
            )
        return read_context(row[column], f"Column {column!r} ({field}) of row {index}", images=self.images)

    def prompt(self, prompt: Prompt, context: Context | None) -> Prompt:
        """The teacher's prompt; the student's prompt itself, unchanged, where there is no privileged context.

        Raises:
            ValueError: a conversational prompt without a user message, or a plain one with privileged images.
        """
        if context is None and self.reads_context:
            return prompt
        before, after = _filled(self.before, context), _filled(self.after, context)
        if isinstance(prompt, str):
            if images_in(context):
                raise ValueError(
                    "A plain-text prompt takes no privileged images. Give conversational prompts, lists of messages, "
                    "and let the trainer apply the chat template."
                )
            return _joined(before) + prompt + _joined(after)
        users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
        if not users:
            raise ValueError(
                f"A conversational prompt needs a user message to put the privileged context into; its roles are "
                f"{[message['role'] for message in prompt]}. Add one, or use plain-text prompts."
            )
        message = prompt[users[-1]]
        content = message["content"]
        if isinstance(content, str) and not images_in(context):
            content = _joined(before) + content + _joined(after)
        elif isinstance(content, str):
            content = merged([*before, {"type": "text", "text": content}, *after])
        else:  # content parts: images and texts keep their order between the two halves of the template
            content = [*before, *content, *after]
        return [*prompt[: users[-1]], {**message, "content": content}, *prompt[users[-1] + 1 :]]

    def prompts(
        self, contexts: Sequence[Context | None], prompts: Sequence[Prompt]
    ) -> tuple[list[Prompt], list[bool]]:
        """The teacher's prompts of a batch, and for each whether the teacher reads more than (or, for an external
        teacher, the same as) the student, so that scoring it is of use."""
        teacher_prompts = [self.prompt(p, context) for p, context in zip(prompts, contexts, strict=True)]
        return teacher_prompts, [context is not None or not self.reads_context for context in contexts]

    def first_and_longest(self, rows: Iterable[Mapping[str, Any]]) -> tuple[int | None, int | None]:
        """The indices of the first row with privileged context and of the one with most text (prompt and context);
        None where no row has any. Raises what `context` raises, for whichever row is bad."""
        first, longest, most = None, None, -1
        for index, row in enumerate(rows):
            context = self.context(row, index) if self.reads_context else ""
            if context is None:
                continue
            first = index if first is None else first
            size = len(text_in(context)) + len(text_of(row["prompt"]))
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
    return _turns_text(turn for turn in turns if turn.get("role") != "tool")


def tools_text(turns: str | Sequence[Mapping[str, Any]]) -> str:
    """What tools wrote in a completion."""
    return "" if isinstance(turns, str) else _turns_text(turn for turn in turns if turn.get("role") == "tool")


def _turns_text(turns: Iterable[Mapping[str, Any]]) -> str:
    # chat templates that parse their output put the thinking into a field of its own
    contents = [turn[part] for turn in turns for part in ("reasoning_content", "content") if turn.get(part)]
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


def _filled(pieces: list[tuple[str, str | None]], context: Context | None) -> list[dict[str, Any]]:
    """A half of the template as content parts."""
    own = context if isinstance(context, list) else [{"type": "text", "text": context or ""}]
    parts = []
    for text, name in pieces:
        parts.append({"type": "text", "text": text})
        if name:
            parts += map(opened, own)
    return merged(parts)


def _joined(parts: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)
