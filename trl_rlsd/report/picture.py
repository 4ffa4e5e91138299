"""One completion and the credit of each of its tokens, as plain data: nothing here draws.

ids, gain, weight, credit of a row -> tokens with their text and values -> the spans that got most and least
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from trl_rlsd.spans import token_characters


@dataclass(frozen=True)
class Token:
    """A sampled token.

    Attributes:
        text: what it decodes to. Of the tokens that make up one character, the last has it and the others their names.
        gain: teacher - student, nats; None where the teacher has not scored it.
        weight: exp(sign(A) * evidence), before clipping; None where the credit function has no weight.
        credit: A_t.
        clip: "low" or "high" where the weight was clipped, else "".
        counts: whether the loss counts it; a tool's tokens and padding it does not.
        plain: what the credit is compared with: A (None), or with a gate what it leaves of A where it is closed.
    """

    text: str
    gain: float | None
    weight: float | None
    credit: float
    clip: str = ""
    counts: bool = True
    plain: float | None = None


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) and their mean credit."""

    start: int
    end: int
    credit: float


@dataclass(frozen=True)
class CreditPicture:
    """One completion.

    Attributes:
        tokens: in their order, without padding.
        advantage: A, the group-normalised reward.
        student_prompt, teacher_prompt: exactly as they were read, special tokens included; the teacher's is None where
            it read nothing of this row, or its prompt is not kept. `wrong_prompt`: of a contrast, the one with a wrong
            reference.
        evidence: what the weight is taken of: the "gain", it "reversed", the "contrast" of two references; a "gate"
            and None have no weight.
        rewards: by the reward function's name; None where one gave no verdict.
        credit: the credit function's name. `keeps_sign`: whether its credit has the sign of A or is 0.
        lam, clip_range: lambda and eps_w in force for this row; None where the credit function has none.
        step: the optimizer step.
    """

    tokens: tuple[Token, ...]
    advantage: float
    student_prompt: str
    teacher_prompt: str | None
    credit: str
    keeps_sign: bool = True
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    lam: float | None = None
    clip_range: float | None = None
    step: int = 0
    wrong_prompt: str | None = None
    evidence: str | None = "gain"

    @property
    def scored(self) -> bool:
        """Whether the teacher has said anything of it."""
        return any(token.gain is not None for token in self.tokens)

    @property
    def counting(self) -> bool:
        """Whether the loss counts any of its tokens."""
        return any(token.counts for token in self.tokens)

    @property
    def excess(self) -> list[float | None]:
        """By how much each token's credit, or blame where A < 0, is above the plain one; None where it does not count.
        0 everywhere with GRPO. For a credit of either sign, A_t - A."""
        sign = -1.0 if self.keeps_sign and self.advantage < 0 else 1.0
        plain = [self.advantage if token.plain is None else token.plain for token in self.tokens]
        pairs = zip(self.tokens, plain, strict=True)
        return [sign * (token.credit - own) if token.counts else None for token, own in pairs]

    @property
    def most(self) -> Span | None:
        """The run of tokens whose credit (blame, where A < 0) is most above the completion's mean."""
        return self._span(1.0)

    @property
    def least(self) -> Span | None:
        """The run of tokens whose credit is most below the completion's mean."""
        return self._span(-1.0)

    def _span(self, sign: float) -> Span | None:
        excess = self.excess
        there = [value for value in excess if value is not None]
        if not there or max(there) - min(there) < 1e-6:
            return None
        mean = sum(there) / len(there)
        start, end = strongest([None if value is None else sign * (value - mean) for value in excess])
        return Span(start, end, sum(token.credit for token in self.tokens[start:end]) / (end - start))

    @property
    def privileged(self) -> tuple[int, int]:
        """The characters of the teacher's prompt that the student's lacks: what lies between their common beginning
        and end."""
        if self.teacher_prompt is None:
            return 0, 0
        start = _common(self.student_prompt, self.teacher_prompt)
        rest = self.student_prompt[start:], self.teacher_prompt[start:]
        return start, len(self.teacher_prompt) - _common(*(text[::-1] for text in rest))


def _common(first: str, second: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def strongest(values: Sequence[float | None]) -> tuple[int, int]:
    """The non-empty run [start, end) with the largest sum; none reaches across a None. (0, 0) without any value."""
    best, where, total, start = -float("inf"), (0, 0), 0.0, 0
    for index, value in enumerate(values):
        if value is None:
            total, start = 0.0, index + 1
            continue
        if total < 0:
            total, start = 0.0, index
        total += value
        if total > best:
            best, where = total, (start, index + 1)
    return where


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token decodes to: together the decoded text, but for tokens that are a part of a character."""
    if not ids:
        return []
    text, characters = token_characters(ids, tokenizer)
    texts = [text[start:end] for start, end in characters]
    for index in range(len(ids)):
        shares = index + 1 < len(ids) and characters[index] == characters[index + 1] and texts[index]
        if shares or not texts[index]:
            texts[index] = f"⟨{tokenizer.convert_ids_to_tokens(ids[index])}⟩"
    return texts
