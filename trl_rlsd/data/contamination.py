"""Whether a prompt already holds what only the teacher may read.

    prompt, privileged texts -> the first of them that the prompt gives away, and why

The rule, for each text on its own:

- From 20 characters on (without white space, as the trainer's own check counts): the prompt must not contain it, white
  space and case aside; nor at least half of its runs of 8 words, for texts of 16 words or more that are at most twice
  as long as the prompt.
- A shorter text, such as the answer 4, stands in many prompts by chance. It counts only where the prompt states it as
  the answer: behind "answer is", "answer:", "solution:" or "result =", in a box, or behind ####.

Not found: a paraphrase, a short part of a long text. Found although it may be meant so: an answer that is the text of
an option in the prompt (give its letter), a worked example that ends with the same short answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, List, Value

from trl_rlsd.texts import DISTINCTIVE_CHARACTERS, squeeze


logger = logging.getLogger(__name__)

RUN_WORDS = 8
SHARE = 0.5
_WORD = re.compile(r"\w+")
_STATES = r"(?:\\boxed\s*\{|####|(?i:\b(?:answer|solution|result))\**\s*(?:(?i:is)\b\s*:?|:|=))[\s\"'*$(]*"


@dataclass(frozen=True)
class Contamination:
    """A row whose prompt gives away a privileged text.

    Args:
        row: its number.
        name: the column, or the kind of privileged context.
        reason: what was found.
    """

    row: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row} ({self.name}: {self.reason})"


def contaminated_rows(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ("privileged_context",), prompt: str = "prompt"
) -> list[Contamination]:
    """The rows of a dataset whose prompt holds the text of one of the columns; either may be messages.

    Raises: TypeError, where a dataset's column holds neither text nor messages.
    """
    for column in (prompt, *columns):
        _check_column(column, (getattr(rows, "features", None) or {}).get(column))
    found = []
    for index, row in enumerate(rows):
        texts = {column: prompt_text(row[column] or "") for column in columns}
        if leak := given_away(prompt_text(row[prompt]), texts):
            found.append(Contamination(index, *leak))
    return found


def clean(rows: Dataset, leaks: Sequence[Contamination], what: str) -> Dataset:
    """The rows of a dataset without those that leak.

    Args:
        what: `"drop"` them and log their number, `"refuse"` the dataset, or `"ignore"` them.

    Raises: ValueError, where it is to refuse, and where no row would be left.
    """
    if not leaks or what == "ignore":
        return rows
    said = f"{len(leaks)} of {len(rows)} rows have privileged text in their prompt"
    if what == "drop" and len(leaks) < len(rows):
        logger.warning("%s and are dropped, the first: %s.", said, leaks[0])
        bad = {leak.row for leak in leaks}
        return rows.select([i for i in range(len(rows)) if i not in bad])
    raise ValueError(
        f"{said}, e.g. {', '.join(map(str, leaks[:3]))}: the student would be trained to copy it. Take it out of the "
        "prompt (prompt_template) or out of privileged=; contamination='drop' leaves them out, 'ignore' does not."
    )


def given_away(prompt: str, texts: Mapping[str, str | None]) -> tuple[str, str] | None:
    """The name of the first text that a prompt gives away, and the reason; None where it gives away none."""
    for name, text in texts.items():
        if text and text.strip() and (reason := _reason(prompt, text)):
            return name, reason
    return None


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """All text of a prompt: its own, or that of its messages."""
    if isinstance(prompt, str):
        return prompt
    texts: list[str] = []
    for message in prompt:
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        texts.extend(parts)
    return "\n".join(texts)


def _check_column(name: str, kind: Any) -> None:
    if isinstance(kind, Value):
        good = kind.dtype in ("string", "large_string", "string_view", "null")
    else:
        good = not isinstance(kind, List) or isinstance(kind.feature, dict)
    if not good:
        called = kind.dtype if isinstance(kind, Value) else str(kind)
        raise TypeError(
            f"Column {name!r} is of type {called}; it must be text or a list of messages. Convert it: dataset = "
            f"dataset.map(lambda row: {{{name!r}: str(row[{name!r}])}}), or write it as text in the file."
        )


def _reason(prompt: str, text: str) -> str | None:
    needle = squeeze(text)
    if len(needle) < DISTINCTIVE_CHARACTERS:
        # not inside a longer number or word: the answer 4 is not stated by "answer: 4.5"
        stated = re.search(_STATES + re.escape(text.strip()) + r"(?![\w%/^]|[.,]\d)", prompt)
        return f"the prompt states {stated.group()!r:.60}" if stated else None
    shown = squeeze(prompt)
    if len(needle) * SHARE > len(shown):  # too long for half of it to be there
        return None
    if needle in shown:
        return f"the prompt contains {text.strip()!r:.60}"
    count, total = _shared_runs(text, prompt)
    if total > RUN_WORDS and count >= SHARE * total:
        return f"the prompt contains {count} of its {total} runs of {RUN_WORDS} words"
    return None


def _shared_runs(text: str, prompt: str) -> tuple[int, int]:
    """How many of the runs of words in a text are in a prompt, and how many there are."""
    words, shown = (_WORD.findall(t.casefold()) for t in (text, prompt))
    runs = {tuple(shown[i : i + RUN_WORDS]) for i in range(len(shown) - RUN_WORDS + 1)}
    places = range(len(words) - RUN_WORDS + 1)
    return sum(tuple(words[i : i + RUN_WORDS]) in runs for i in places), len(places)
