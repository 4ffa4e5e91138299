"""How texts are compared where their spacing and case do not count, and how they are shown to people."""

from __future__ import annotations

import re
import unicodedata


# squeezed; a shorter text (an answer such as "4" or "B") occurs in many prompts by coincidence and proves no leak
DISTINCTIVE_CHARACTERS = 20


def squeeze(text: str) -> str:
    """A text for comparison: chat templates trim, tokenizers fold, models space their answers as they like."""
    return "".join(text.split()).casefold()


# an image is a run of the same token, hundreds of times
_RUN = re.compile(r"(<[^<>\s]{1,40}>)\1{3,}")


def collapse(text: str) -> str:
    """A prompt for people: a special token that stands there many times on end, once and with the number."""
    return _RUN.sub(lambda run: f"{run[1]} x {len(run[0]) // len(run[1])}", text)


def visible(text: str) -> str:
    """A text that cannot act on what shows it: control characters (escape sequences of a terminal begin with one) as
    their pictures, marks that reorder or hide text as their code points. Line breaks and tabs stay."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or character.isprintable():
        return character
    if code < 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    if unicodedata.category(character) == "Zs":  # wide and thin spaces are no more than that
        return character
    return f"⟨U+{code:04X}⟩"
