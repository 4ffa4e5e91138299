"""The privileged context of a row: its parts, each with a heading, and documents within a budget of tokens.

    answer, trace, tests, schema, documents of a row -> the text that the teacher reads, or None

Only documents are ever cut, never an answer, and the question is no part of it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any


# In the order in which the teacher reads them: background first, what decides last.
HEADINGS = {
    "documents": "Documents",
    "schema": "Schema",
    "tests": "Tests",
    "trace": "Worked solution",
    "answer": "Final answer",
}
KINDS = tuple(HEADINGS)

# where a text may be cut, the best place first: after a paragraph, a sentence, a word, a character
_BREAKS = [re.compile(end) for end in (r"\n[^\S\n]*\n", r"(?<=[.!?])\s+|(?<=[。！？])", r"\s+", r"(?s)(?=.)")]


def privileged_context(parts: Mapping[str, str | None]) -> str | None:
    """One text of a row's parts, by kind; None where there is none.

    A part that stands alone stands bare: the answer 72 is "72". Several get a heading each, in the order of `KINDS`.

    Raises: ValueError, for a kind that is not one of `KINDS`.
    """
    if unknown := [kind for kind in parts if kind not in HEADINGS]:
        raise ValueError(f"{unknown[0]!r} is not a kind of privileged context; the kinds are {', '.join(KINDS)}.")
    texts = {kind: text.strip() for kind in KINDS if (text := parts.get(kind)) and text.strip()}
    if len(texts) < 2:
        return next(iter(texts.values()), None)
    return "\n\n".join(f"{HEADINGS[kind]}:\n{text}" for kind, text in texts.items())


def as_text(value: Any) -> str | None:
    """A value of a row as a part: a string as it is, a list of strings one a line, else JSON; None stays None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return json.dumps(value, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Documents:
    """Where the documents of a row are, and how much of them the teacher reads.

    Args:
        columns: with the text itself: a string or a list of strings in each row.
        files: of UTF-8 text: columns that hold a path or a list of paths, or paths themselves, read for every row.
        root: the folder that paths are relative to; a path that leads out of it is refused.
        budget: most tokens of all documents of a row together; None takes them whole. What is beyond is cut after the
            last paragraph that fits; where not even the first one fits, after a sentence, else a word, else a
            character. Headings and other kinds are neither counted nor cut.
        tokenizer: counts the tokens of the budget: a tokenizer of transformers (or a processor that holds one), or a
            function text -> tokens.

    Raises:
        ValueError: nothing to read, a budget below 1, or a budget without a tokenizer.
    """

    columns: Sequence[str] = ()
    files: Sequence[str] = ()
    root: str | Path = "."
    budget: int | None = None
    tokenizer: Any = field(default=None, repr=False)

    def __post_init__(self):
        for name in ("columns", "files"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        if not self.columns and not self.files:
            raise ValueError("Documents has neither columns nor files. Name the columns or the files to read.")
        if self.budget is not None and (isinstance(self.budget, bool) or self.budget < 1):
            raise ValueError(f"Documents(budget={self.budget!r}): give a number of tokens from 1 on, or None for all.")
        if self.budget is not None and not callable(self.tokenizer):
            raise ValueError(
                f"Documents(budget={self.budget}, tokenizer={self.tokenizer!r:.80}): a budget needs a tokenizer that "
                "counts. Pass AutoTokenizer.from_pretrained(model), or a function text -> tokens."
            )

    def read(self, row: Mapping[str, Any]) -> tuple[str | None, int]:
        """The documents of a row as one text, None where it has none, and the number of tokens that were cut.

        Raises:
            ValueError: a file is missing, outside of `root` or not UTF-8, or a column holds something else than text;
                the message names it.
        """
        texts = [text for column in self.columns for text in _strings(row[column], column)]
        for name in self.files:
            paths = _strings(row[name], name) if name in row else [name]
            texts += [_file(Path(self.root), path) for path in paths]
        whole = "\n\n".join(text.strip() for text in texts if text.strip())
        if self.budget is None or not whole:
            return whole or None, 0
        # a processor's own tokenizer: a processor need not be hashable
        return _cut(whole, self.budget, getattr(self.tokenizer, "tokenizer", self.tokenizer))


def count_tokens(text: str, tokenizer: Any) -> int:
    """The tokens of a text, without special ones."""
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        # not verbose: a document may be longer than the model's limit, that is why it is counted
        return len(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    return len(tokenizer(text))


def longest_start(text: str, budget: int, tokenizer: Any) -> str:
    """The longest start of a text within a budget of tokens, that ends where a paragraph does; see [`Documents`]."""

    def tokens(end: int) -> int:
        return count_tokens(text[:end], tokenizer)

    for place in _BREAKS:
        ends = [match.start() for match in place.finditer(text) if match.start()]
        # a longer text can have fewer tokens, by a few; what bisection returns was counted, and fits
        if fitting := bisect_right(ends, budget, key=tokens):
            return text[: ends[fitting - 1]].rstrip()
    return ""


# rows share documents, such as one handbook for all
@lru_cache(maxsize=64)
def _cut(text: str, budget: int, tokenizer: Any) -> tuple[str | None, int]:
    total = count_tokens(text, tokenizer)
    if total <= budget:
        return text, 0
    kept = longest_start(text, budget, tokenizer)
    return kept or None, total - (count_tokens(kept, tokenizer) if kept else 0)


def _strings(value: Any, column: str) -> list[str]:
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str | None) for item in values):
        raise ValueError(f"column {column!r} holds {value!r:.80}; documents are a string or a list of strings.")
    return [item for item in values if item]


def _file(root: Path, path: str) -> str:
    file = (root / path).resolve()
    if not file.is_relative_to(root.resolve()):
        raise ValueError(f"the document {path!r} is outside of root={str(root)!r}. Give a root that holds it.")
    if not file.is_file():
        raise ValueError(f"there is no document {path!r} in root={str(root)!r} ({file}).")
    try:
        return _text(file, file.stat().st_mtime_ns)
    except UnicodeDecodeError as error:
        raise ValueError(f"the document {path!r} in root={str(root)!r} is not UTF-8 text: {error}.") from error


@lru_cache(maxsize=64)
def _text(file: Path, changed: int) -> str:
    return file.read_text(encoding="utf-8-sig")
