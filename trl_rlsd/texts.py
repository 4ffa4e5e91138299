"""How texts are compared where their spacing and case do not count."""

from __future__ import annotations


# squeezed; a shorter text (an answer such as "4" or "B") occurs in many prompts by coincidence and proves no leak
DISTINCTIVE_CHARACTERS = 20


def squeeze(text: str) -> str:
    """A text for comparison: chat templates trim, tokenizers fold, models space their answers as they like."""
    return "".join(text.split()).casefold()
