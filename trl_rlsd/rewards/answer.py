"""What of a completion is its final answer."""

from __future__ import annotations

import re


# where an answer begins to be stated
_SAYS = r"(?:\banswer\**+\s*+(?:is\b\s*+[:：]?|would be\b|should be\b|[:：])|答案\s*+(?:是|为|[:：]))"
STATEMENT = re.compile(rf"\\(?:boxed|fbox)\{{|<answer>|####|{_SAYS}", re.IGNORECASE)
# linear in the text, whatever a model writes: nothing is tried twice (`*+`)
_STATED = re.compile(rf"(?:####|{_SAYS})\s*+\**+\s*+(.+)", re.IGNORECASE)
_BRACES = re.compile(r"\\(?:boxed|fbox)\{|[{}]")


def final_answer(text: str) -> str | None:
    """The final answer in a completion's text; None where it states none.

    In this order, the last of each kind: `\\boxed{...}` or `\\fbox{...}`, `<answer>...</answer>`, the rest of a line
    after `####`, "answer is", "answer:" or the like. Only what follows a thinking block is read; a block that was
    never closed has no answer.
    """
    text = after_thinking(text)
    if text is None:
        return None
    # behind a sentence's answer stand its marks; in a box, 5! is a factorial
    for answers, marks in ((last_boxed(text), ".*"), (_tagged(text), ".*"), (_STATED.findall(text), ".*!。")):
        answer = answers[-1].strip().rstrip(marks).strip() if answers else ""
        if answer:
            return answer
    return None


def after_thinking(text: str) -> str | None:
    """What follows the last thinking block; the whole text where there is none, None where one was never closed."""
    _, closed, after = text.rpartition("</think>")
    if "<think>" in (after if closed else text):
        return None
    return after if closed else text


def last_boxed(text: str) -> list[str]:
    """The content of the closed `\\boxed{...}` that begins last, with balanced braces; empty where there is none."""
    last, opened = None, []
    for brace in _BRACES.finditer(text):
        if brace.group() != "}":
            opened.append(brace)
        elif opened and (start := opened.pop()).group() != "{" and (last is None or start.end() > last[0]):
            last = start.end(), brace.start()
    return [] if last is None else [text[slice(*last)]]


def _tagged(text: str) -> list[str]:
    before, closed, _ = text.rpartition("</answer>")
    _, opened, answer = before.rpartition("<answer>")
    return [answer] if closed and opened else []
