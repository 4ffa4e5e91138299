"""Where in a completion token credit acts; the other tokens keep the plain advantage.

    completion ids (B, T) -> text and each token's characters -> a span of characters -> the tokens that overlap it

A tag is looked for in the text, not among the ids: tokenizers merge its ends with what stands beside it, and a list of
ids that is never met would silently select nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from accelerate.logging import get_logger
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from trl_rlsd.dotted import load
from trl_rlsd.rewards.answer import STATEMENT


logger = get_logger(__name__)

_OPEN, _CLOSE = "<think>", "</think>"
# Completions among which a span must have been found once; a model may state an answer in few of them at first.
_PATIENCE = 256


def thinking(text: str) -> tuple[int, int] | None:
    """The characters of the first thinking block. A template may have opened it in the prompt, and a truncated
    completion may not close it; with neither tag there is none."""
    start, end = text.find(_OPEN), text.find(_CLOSE)
    if start == end == -1:
        return None
    if start == -1 or -1 < end < start:  # opened in the prompt
        return 0, end
    return start + len(_OPEN), end if end != -1 else len(text)


def before_answer(text: str) -> tuple[int, int] | None:
    """The characters before the last `\\boxed{`, `<answer>`, `####`, "answer is" or "answer:"; None where no answer is
    stated."""
    starts = [match.start() for match in STATEMENT.finditer(text)]
    return (0, starts[-1]) if starts else None


def final_answer_span(text: str) -> tuple[int, int] | None:
    """The characters from where the answer is stated to the end."""
    before = before_answer(text)
    return None if before is None else (before[1], len(text))


SPANS: dict[str, Callable[[str], tuple[int, int] | None] | None] = {
    "all": None,
    "thinking": thinking,
    "before_answer": before_answer,
}


def get_span(name: str) -> Callable | None:
    """A span by name, None for the whole completion, or a user's function by its dotted path.

    Raises: ValueError, where there is no such function.
    """
    if name in SPANS:
        return SPANS[name]
    return load("credit_span", name, ", ".join(map(repr, SPANS)), "text -> (first character, end) or None")


def token_characters(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The decoded text, and the (first, end) characters of each token in it. The tokens of a character that takes
    several of them all have that character."""
    try:
        stream, text, characters, pending = DecodeStream(skip_special_tokens=False), "", [], 0
        for token in ids:
            piece, pending = stream.step(tokenizer.backend_tokenizer, token), pending + 1
            if piece is not None:
                characters += [(len(text), len(text) + len(piece))] * pending
                text, pending = text + piece, 0
        return text, characters + [(len(text), len(text))] * pending
    except Exception:  # a tokenizer in Python, or bytes that are no text: by prefixes, which takes longer
        texts = [tokenizer.decode(ids[: end + 1], skip_special_tokens=False) for end in range(len(ids))]
        ends = list(accumulate(map(len, texts), max))
        return texts[-1], list(zip([0, *ends[:-1]], ends, strict=True))


def lengths(mask: torch.Tensor) -> list[int]:
    """How far each completion reaches: the number of tokens up to the last one whose mask, (B, T), is 1."""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(1).tolist()


class TokenSpan:
    """A span of characters in a tokenizer's tokens.

    Args:
        find: text -> (first character, end) or None; None: nothing is looked for.
        tokenizer: decodes completions; special tokens count as their text.
        name: for messages.
    """

    def __init__(self, find: Callable | None, tokenizer: PreTrainedTokenizerBase, name: str = "span"):
        self.find = find
        self.tokenizer = tokenizer
        self.name = name

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, step: int = 0) -> torch.Tensor:
        """The tokens that overlap the span, (B, T) bool; none in a row in which it is not found. Tokens whose mask is
        0 are in no span, and their text is blank.

        Raises: ValueError, where the function returned no pair of characters within the text; with step and row.
        """
        return self.tokens(ids, mask, step)[0]

    def tokens(self, ids: torch.Tensor, mask: torch.Tensor, step: int) -> tuple[torch.Tensor, int, int]:
        """The same, with the number of rows that have tokens and of those in which the span, even if empty, is."""
        span, rows, found_rows = torch.zeros(ids.shape, dtype=torch.bool), 0, 0
        for row, (own, kept, length) in enumerate(zip(ids.tolist(), mask.tolist(), lengths(mask), strict=True)):
            if length == 0:
                continue
            text, characters = token_characters(own[:length], self.tokenizer)
            for (first, after), is_own in zip(characters, kept[:length], strict=True):
                if not is_own:  # a tool's, which may have tags and answers too
                    text = text[:first] + " " * (after - first) + text[after:]
            found, rows = self.find(text), rows + 1
            if found is None:
                continue
            start, end = self._checked(found, text, f"Step {step}: {self.name} returned {found!r} for row {row}")
            found_rows += 1
            for token, (first, after) in enumerate(characters):
                span[row, token] = kept[token] and first < end and after > start
        return span.to(ids.device), rows, found_rows

    @staticmethod
    def _checked(found, text: str, what: str) -> tuple[int, int]:
        if (
            not isinstance(found, tuple | list)
            or len(found) != 2
            or not all(isinstance(edge, int) for edge in found)
            or not 0 <= found[0] <= found[1] <= len(text)
        ):
            raise ValueError(
                f"{what}, a text of {len(text)} characters. It must return (first character, end) with 0 <= first <= "
                f"end <= {len(text)}, or None."
            )
        return found[0], found[1]


class CreditSpan(TokenSpan):
    """The span of `RLSDConfig(credit_span=name)`, which must be found at least once among the first completions."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        super().__init__(get_span(name), tokenizer, f"credit_span={name!r}")
        self.missed = 0  # completions without the span; -1 once there was one with it

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, step: int = 0) -> torch.Tensor:
        """See [`TokenSpan`]. Raises: ValueError, also where none of the first completions has it."""
        span, rows, found = self.tokens(ids, mask, step)
        if found:
            self.missed = -1
        elif self.missed >= 0:
            if self.missed == 0 and rows:
                logger.warning(f"{self.name} is in none of the first {rows} completions: no token credit acts there.")
            self.missed += rows
            if self.missed >= _PATIENCE:
                raise ValueError(
                    f"Step {step}: {self.name} was found in none of the first {self.missed} completions, so token "
                    "credit would act nowhere. Check that the model writes the tags or states its answer in a form "
                    "that is looked for, and that max_completion_length leaves room; or use credit_span='all'."
                )
        return span
