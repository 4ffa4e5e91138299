"""Whether completions hold what only the teacher may read.

    texts of completions, privileged contexts, prompts -> {name: (sum, count)}

Two gauges, neither of them a proof: words that a completion shares with the privileged text and not with its prompt,
and phrases that cite a reference. A right completion shares the answer itself, so contexts shorter than an n-gram are
not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


NGRAM_WORDS = 5
# what completions were seen to say of a reference that is not in their prompt (arXiv:2604.03128 shows such texts)
LEAK_PHRASES = (
    "the reference",
    "reference answer",
    "reference solution",
    "given solution",
    "given answer",
    "provided answer",
    "provided solution",
    "as provided",
    "according to the answer",
    "according to the solution",
)
_WORD = re.compile(r"\w+")


def ngrams(text: str, n: int = NGRAM_WORDS) -> set[tuple[str, ...]]:
    """The runs of n words in a text, case folded."""
    words = [word.casefold() for word in _WORD.findall(text)]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def overlap(completion: str, context: str, prompt: str) -> float | None:
    """The share of a completion's n-grams that are in the privileged context and not in the prompt; None where context
    or completion is shorter than one. A completion that copies the context whole has 1."""
    own, privileged = ngrams(completion), ngrams(context)
    if not own or not privileged:
        return None
    return len(own & privileged - ngrams(prompt)) / len(own)


def cites(completion: str, prompt: str, phrases: Sequence[str]) -> bool:
    """Whether a completion holds one of the phrases that its prompt does not hold, whatever their case."""
    completion, prompt = completion.casefold(), prompt.casefold()
    return any(phrase.casefold() in completion and phrase.casefold() not in prompt for phrase in phrases)


def leak_metrics(
    completions: Sequence[str], prompts: Sequence[str], contexts: Sequence[str | None], phrases: Sequence[str]
) -> dict[str, tuple[float, int]]:
    """`leak_overlap`: mean overlap; `leak_cites`: share of completions that cite. Of rows with a context."""
    overlaps, cited, rows = [], 0, 0
    for completion, prompt, context in zip(completions, prompts, contexts, strict=True):
        if context is None:
            continue
        rows += 1
        cited += cites(completion, prompt, phrases)
        shared = overlap(completion, context, prompt)
        if shared is not None:
            overlaps.append(shared)
    return {"leak_overlap": (sum(overlaps), len(overlaps)), "leak_cites": (cited, rows)}
