"""Blocks between Markdown's code fences (three backticks or more), as models write them."""

from __future__ import annotations

import re
from typing import NamedTuple


_OPENING = re.compile(r"(`{3,}+)[ \t]*+([\w+#.-]*+)[ \t]*+(.*)", re.DOTALL)


class Block(NamedTuple):
    language: str  # in lower case; "" where the fence names none
    content: str
    closed: bool


def last_block(text: str, *languages: str) -> str | None:
    """The content of the last closed block in one of these languages, else of one that runs to the end of the text;
    None where there is neither."""
    blocks = [block for block in fenced_blocks(text) if block.language in languages]
    closed = [block for block in blocks if block.closed]
    return (closed or blocks)[-1].content if blocks else None


def fenced_blocks(text: str) -> list[Block]:
    """The blocks of a text, in order, in time linear in it.

    More lenient than CommonMark in three ways: a fence may open at the end of a line of prose ("Answer: ```json"), its
    content may begin beside it, and it may close at the end of a line of content. Backticks inside a line never close.
    """
    blocks: list[Block] = []
    lines: list[str] = []
    fence, language = "", ""
    for line in text.split("\n"):
        if not fence:
            opening = _OPENING.search(line)
            if opening is None or (opening[3].strip() and line[: opening.start()].strip()):
                continue
            fence, language, line = opening[1], opening[2].lower(), opening[3]
            lines = []
            if not line.strip():
                continue
        ended, begun = line.rstrip(), line.lstrip()
        if ended.endswith(fence):
            last = ended.rstrip("`")
            content = [*lines, last] if last.strip() else lines
        elif begun.startswith(fence) and not begun.lstrip("`")[0].isalnum():
            content = lines
        else:
            lines.append(line)
            continue
        blocks.append(Block(language, "\n".join(content), True))
        fence = ""
    if fence:
        blocks.append(Block(language, "\n".join(lines), False))
    return blocks
