"""What of a completion is its final answer."""

from __future__ import annotations

import re


# where an answer begins to be stated
STATEMENT = re.compile(r"\\boxed\{|<answer>|####|\banswer\**\s*(?:is\b|:)", re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_STATED = re.compile(r"(?:####|\banswer\**\s*(?:is\b\s*:?|:))\s*\**\s*(.+)", re.IGNORECASE)


def final_answer(text: str) -> str | None:
    """The final answer in a completion's text; None where it states none.

    In this order, the last of each kind: `\\boxed{...}`, `<answer>...</answer>`, the rest of a line after `####`,
    "answer is" or "answer:". Only what follows a thinking block is read; a block that was never closed has no answer.
    """
    before, closed, after = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return None
    text = after if closed else text
    for answers in (boxed(text), _TAGGED.findall(text), _STATED.findall(text)):
        stripped = [answer.strip().rstrip(".*").strip() for answer in answers]
        if stripped and stripped[-1]:
            return stripped[-1]
    return None


def squeeze(text: str) -> str:
    """A text for comparison: chat templates trim, tokenizers fold, models space their answers as they like."""
    return "".join(text.split()).casefold()


def boxed(text: str) -> list[str]:
    """The contents of every closed `\\boxed{...}`, with balanced braces."""
    found, start = [], text.find("\\boxed{")
    while start != -1:
        depth, position = 1, start + len("\\boxed{")
        while position < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            position += 1
        if depth == 0:
            found.append(text[start + len("\\boxed{") : position - 1])
        start = text.find("\\boxed{", start + 1)
    return found
