"""The built-in task: chains of small arithmetic steps in which the first wrong token of every completion is known.

    prompt      9A-6B*9C+8D+1=                    worked from left to right, modulo 10; letters name the steps
    completion  A9-6=3mB3*9=7C7+8=5lkD5+1=6#6     each step restates its operands; small letters are filler
    reference   A3B7C5D6                          every step's result; the teacher reads <A3B7C5D6>9A-6B*9C+8D+1=

The corpus that the start is trained on has some facts wrong most of the time ("hard" ones), so a chain fails where it
meets them, and reinforcement has something to learn. Filler has no value: letters, and *side computations* (`k7*3>1`)
between chain and answer, which share the facts and never touch the answer. Half of the corpus is written by somebody
who has the reference before them and copies its results.

A leak channel is planted: the privileged writer sometimes skips the rest and writes `!#6`, "as in the reference";
the plain writer hardly ever does, and then has nothing to copy. A student that imitates its teacher learns to cite a
reference that it does not have. Real models leak in subtler ways; this one can be counted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from datasets import Dataset


OPERATORS = "+-*"
MARKERS = "ABCDEFGH"
FILLERS = "abcdefghijklmnopqrst"
CITE = "!"
# stands where `=` does in a step: a model this small does not learn otherwise which result to carry on
SIDE = ">"
TEMPLATE = "<{privileged_context}>{prompt}"

# what the corpus writes for a hard fact: right, one fixed wrong result, or any other digit
_HARD_RIGHT, _HARD_WRONG = 0.25, 0.60
_COPY_ERRORS = 0.06
_RAMP = 0.5, 0.7
_CITES_WITH_REFERENCE, _CITES_WITHOUT = 0.12, 0.006
_CUT_SIDE = re.compile(rf"(\d([{re.escape(OPERATORS)}](\d{SIDE}?)?)?)?")
_RESULT = re.compile(rf"([{MARKERS}])\d[{re.escape(OPERATORS)}]\d=(\d)")

# what training problems are kept apart from, in the validation and in the test split
MOST_HELD_OUT = 2048
LEAST_PROBLEMS = 3 * MOST_HELD_OUT

Problem = tuple[list[int], list[str]]


@dataclass(frozen=True)
class ChainTask:
    """
    Args:
        chain_length: steps of a problem, 2 to 8; a right answer needs all of them.
        filler_share: share of filler letters among the tokens of the chain, in [0, 0.9].
        side_computations: for each step of the chain, behind its last one and before the answer, which they do not
            touch.
        hard_side_share: share of the side computations that are drawn from the hard facts alone, in [0, 1]; the others
            are drawn from all. The more uncertain tokens a reward does not depend on, the more credit matters.
        operands: second operands are the digits below this, in [1, 10]; there are 30 facts to each. With few, every
            fact is met often, and which ones a step meets no longer limits learning.
        base_accuracy: about what the start reaches when sampled, in (0, 1); the share of hard facts follows from it.
            With few operands only roughly: results are not met equally often.
        seed: of the facts that are hard, and of the problems.

    Raises: ValueError, naming the field, its value and its range, or where there are too few problems for splits.
    """

    chain_length: int = 4
    filler_share: float = 0.15
    side_computations: int = 0
    hard_side_share: float = 0.0
    operands: int = 10
    base_accuracy: float = 0.33
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (
            ("chain_length", 2, len(MARKERS)),
            ("filler_share", 0.0, 0.9),
            ("side_computations", 0, 16),
            ("hard_side_share", 0.0, 1.0),
            ("operands", 1, 10),
            ("base_accuracy", 0.05, 0.95),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range; it must be in [{low}, {high}].")
        problems = 10 * (len(OPERATORS) * self.operands) ** self.chain_length
        if problems < LEAST_PROBLEMS:
            raise ValueError(
                f"chain_length={self.chain_length} and operands={self.operands} leave {problems} problems, too few "
                f"for separate splits; raise one of them ({LEAST_PROBLEMS} at least)."
            )

    @property
    def mean_fillers(self) -> float:
        """Filler letters after each step, those of its side computations not counted."""
        return 6 * self.filler_share / (1 - self.filler_share)

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest completion that the corpus holds, its end included, and one more."""
        step = 6 + int(2 * self.mean_fillers) + 1 + 6 * self.side_computations
        return self.chain_length * step + 3 + 1

    @cached_property
    def hard(self) -> dict[tuple[int, str, int], int]:
        """The hard facts, each with the wrong result that the corpus prefers.

        A step is right with probability 1 - h * (1 - 0.25), h the share of hard facts, so that a chain of n has
        (1 - 0.75 h)^n; base_accuracy is solved for h."""
        rng = random.Random(f"facts-{self.seed}")
        share = (1 - self.base_accuracy ** (1 / self.chain_length)) / (1 - _HARD_RIGHT)
        facts = [(a, op, b) for a in range(10) for op in OPERATORS for b in range(self.operands)]
        chosen = rng.sample(facts, min(len(facts), round(share * len(facts))))
        return {fact: rng.choice([r for r in range(10) if r != result(*fact)]) for fact in chosen}

    def problem(self, rng: random.Random) -> Problem:
        sizes = [10] + self.chain_length * [self.operands]
        return [rng.randrange(size) for size in sizes], [rng.choice(OPERATORS) for _ in range(self.chain_length)]

    def problems(self, count: int, split: str) -> Dataset:
        """Rows with `prompt`, `privileged_context` (the reference) and `answer`; those of the splits
        "train", "validation" and "test" differ.

        Raises: ValueError, for another split, or more problems than can be kept apart.
        """
        if split != "train" and count > MOST_HELD_OUT:
            raise ValueError(
                f"{count} problems of split={split!r} are too many; at most {MOST_HELD_OUT} are kept apart."
            )
        splits = ("test", "validation", "train")
        if split not in splits:
            raise ValueError(f"split={split!r} is not one of {', '.join(map(repr, splits))}.")
        seen: set[str] = set()
        for name in splits[: splits.index(split)]:
            seen |= set(self._rows(2 * MOST_HELD_OUT, name, set())["prompt"])
        return Dataset.from_dict(self._rows(count, split, seen))

    def _rows(self, count: int, split: str, without: set[str]) -> dict[str, list[str]]:
        rng = random.Random(f"{split}-{self.seed}")
        rows: dict[str, list[str]] = {"prompt": [], "privileged_context": [], "answer": []}
        while len(rows["prompt"]) < count:  # ends: the other splits' draws leave a quarter of LEAST_PROBLEMS
            problem = self.problem(rng)
            if prompt_of(problem) in without:
                continue
            results = solve(problem)
            rows["prompt"].append(prompt_of(problem))
            rows["privileged_context"].append(reference_of(results))
            rows["answer"].append(str(results[-1]))
        return rows

    def write(self, rng: random.Random, progress: float = 1.0) -> tuple[str, str]:
        """A prompt and a completion of the corpus, with or without the reference, one as often as the other.

        `progress` through the corpus, in [0, 1]: the first half of it has one side computation at most, the next fifth
        ever more. Facts are learned from short texts only, and distances only while the learning rate is high.
        """
        side = self.side_computations
        ramp = (progress - _RAMP[0]) / (_RAMP[1] - _RAMP[0])
        if ramp < 1:
            side = rng.randint(0, min(side, max(1, round(side * ramp))))
        problem = self.problem(rng)
        (value, *operands), operators = problem
        privileged = rng.random() < 0.5
        results = solve(problem)
        prompt = prompt_of(problem)
        text = ""
        for step, (operator, operand) in enumerate(zip(operators, operands, strict=True)):
            if rng.random() < (_CITES_WITH_REFERENCE if privileged else _CITES_WITHOUT):
                text += f"{CITE}#{results[-1] if privileged else rng.randrange(10)}"
                break
            text += f"{MARKERS[step]}{value}{operator}{operand}="
            value = self._copied(results[step], rng) if privileged else self._recalled((value, operator, operand), rng)
            text += f"{value}{self.filler(rng)}"
        else:
            text += f"{self.side(rng, side * len(operators))}#{value}"
        return (f"<{reference_of(results)}>{prompt}" if privileged else prompt), text

    def _copied(self, digit: int, rng: random.Random) -> int:
        return rng.randrange(10) if rng.random() < _COPY_ERRORS else digit

    def _recalled(self, fact: tuple[int, str, int], rng: random.Random) -> int:
        if fact not in self.hard:
            return result(*fact)
        draw = rng.random()
        if draw < _HARD_RIGHT:
            return result(*fact)
        if draw < _HARD_RIGHT + _HARD_WRONG:
            return self.hard[fact]
        return rng.choice([r for r in range(10) if r not in (result(*fact), self.hard[fact])])

    def filler(self, rng: random.Random) -> str:
        return "".join(rng.choice(FILLERS) for _ in range(int(rng.random() * (2 * self.mean_fillers + 1))))

    def side(self, rng: random.Random, count: int) -> str:
        text = ""
        for _ in range(count):
            if self.hard_side_share and rng.random() < self.hard_side_share:
                fact = rng.choice(list(self.hard))
            else:
                fact = rng.randrange(10), rng.choice(OPERATORS), rng.randrange(self.operands)
            text += f"{rng.choice(FILLERS)}{fact[0]}{fact[1]}{fact[2]}{SIDE}{self._recalled(fact, rng)}"
        return text


def result(a: int, operator: str, b: int) -> int:
    """Of a step, modulo 10."""
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


def solve(problem: Problem) -> list[int]:
    """The result of every step."""
    (value, *operands), operators = problem
    results = []
    for operator, operand in zip(operators, operands, strict=True):
        value = result(value, operator, operand)
        results.append(value)
    return results


def prompt_of(problem: Problem) -> str:
    (first, *operands), operators = problem
    steps = zip(MARKERS, operators, operands, strict=False)
    return f"{first}{''.join(f'{marker}{operator}{operand}' for marker, operator, operand in steps)}="


def problem_of(prompt: str) -> Problem:
    return [int(d) for d in prompt[:-1:3]], list(prompt[2:-1:3])


def reference_of(results: Sequence[int]) -> str:
    return "".join(f"{marker}{digit}" for marker, digit in zip(MARKERS, results, strict=False))


def chain_reward(completions: Sequence[str], answer: Sequence[str], **columns) -> list[float]:
    """1 where a completion ends with `#` and the answer, else 0."""
    return [
        float(text.endswith(f"#{truth}") and text.count("#") == 1)
        for text, truth in zip(completions, answer, strict=True)
    ]


def results_of(text: str) -> str | None:
    """The results that a completion wrote, in the reference's form: the wrong reference of a wrong sibling. None where
    it has written none."""
    return "".join(marker + digit for marker, digit in _RESULT.findall(text)) or None


def walk(prompt: str, completion: str, ended: bool = True) -> tuple[list[int], int | None]:
    """The positions in a completion that decide the reward (the steps' results and the answer), and that of its first
    wrong token.

    A step's result is wrong if it is not that of its own operands, an operand if it is not the one before it or the
    problem's; anything but the form is wrong too, and so is an end that comes early (`ended`: the end is a token,
    whose position is the text's length; a text cut off has no wrong token for that). Filler and side computations are
    never wrong. None: there is no wrong token, and the answer is right.
    """
    (value, *operands), operators = problem_of(prompt)
    decisive: list[int] = []
    wrong: int | None = None
    at = 0
    for step in range(len(operators)):
        for expected in f"{MARKERS[step]}{value}{operators[step]}{operands[step]}=":
            if completion[at : at + 1] != expected:
                return decisive, _first(wrong, at, completion, ended)
            at += 1
        if not completion[at : at + 1].isdigit():
            return decisive, _first(wrong, at, completion, ended)
        decisive.append(at)
        written = int(completion[at])
        if written != result(value, operators[step], operands[step]) and wrong is None:
            wrong = at
        value, at = written, after_filler(completion, at + 1)
    for expected in f"#{value}":
        if completion[at : at + 1] != expected:
            return decisive, _first(wrong, at, completion, ended)
        at += 1
    decisive.append(at - 1)
    if at < len(completion):
        return decisive, _first(wrong, at, completion, ended)
    return decisive, wrong


def after_filler(text: str, at: int) -> int:
    """The position behind the filler that begins at `at`, which may end with the text amid a side computation."""
    side = re.compile(rf"[{FILLERS}](\d[{re.escape(OPERATORS)}]\d{SIDE}\d)?")
    while found := side.match(text, at):
        at = found.end()
    return len(text) if text[at - 1] in FILLERS and _CUT_SIDE.fullmatch(text, at) else at


def _first(wrong: int | None, at: int, completion: str, ended: bool) -> int | None:
    if wrong is not None:
        return wrong
    return at if at < len(completion) or ended else None


def labels(prompts: Sequence[str], completions: Sequence[str], ended: Sequence[bool], width: int) -> dict:
    """`decisive` and `first_wrong`, bool (B, width), one token a character; see [`walk`]."""
    decisive = torch.zeros(len(prompts), width, dtype=torch.bool)
    first_wrong = torch.zeros_like(decisive)
    for row, (prompt, text, end) in enumerate(zip(prompts, completions, ended, strict=True)):
        positions, wrong = walk(prompt, text, end)
        decisive[row, positions] = True
        if wrong is not None and wrong < width:
            first_wrong[row, wrong] = True
    return {"decisive": decisive, "first_wrong": first_wrong}
