"""Wrong references: what a second teacher pass reads in the place of the right one.

    completions of a group, which of them are wrong -> for each row a wrong sibling's reference, or none

Both passes use one template, so that what they have in common (that there is a reference at all, its style) cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trl_rlsd.dotted import load
from trl_rlsd.rewards.answer import final_answer
from trl_rlsd.texts import squeeze


def get_reference(name: str) -> Callable[[str], str | None]:
    """What of a wrong completion's text serves as reference: `"answer"`, `"completion"`, or the dotted path of a
    function text -> str or None.

    Raises: ValueError, where there is no such function.
    """
    if name in ("answer", "completion"):
        return final_answer if name == "answer" else str.strip
    return load("contrast_reference", name, "'answer' or 'completion'", "text -> str or None")


def references_of(texts: Sequence[str], name: str) -> list[str | None]:
    """The reference in each completion's text. Raises: TypeError, where a user's function returns something else."""
    find, found = get_reference(name), []
    for row, text in enumerate(texts):
        found.append(find(text))
        if not isinstance(found[-1], str | None):
            raise TypeError(
                f"contrast_reference={name!r} returned {found[-1]!r:.80} for row {row}; it must return a string, or "
                "None where the completion states none."
            )
    return found


def is_wrong(rewards: torch.Tensor, reward_weights: torch.Tensor, below: float) -> list[bool]:
    """The completions whose weighted total reward is below a threshold; not those that no reward could judge.

    Shapes: `rewards` (N, functions), nan where a function gave None; `reward_weights` (functions,).
    """
    totals = (rewards * reward_weights.to(rewards.device)).nansum(dim=1)
    return ((totals < below) & ~rewards.isnan().all(dim=1)).tolist()


def right_metric(rewards: torch.Tensor, wrong: Sequence[bool]) -> dict[str, tuple[float, int]]:
    """`right`: the share of the completions that a reward could judge, and which are not wrong (`is_wrong`)."""
    judged = int((~rewards.isnan().all(dim=1)).sum())
    return {"right": (judged - sum(wrong), judged)}


def wrong_references(
    references: Sequence[str | None],
    wrong: Sequence[bool],
    group_size: int,
    right: Sequence[str | None],
    first: int = 0,
) -> list[str | None]:
    """For each row the reference of the first wrong completion of its group that says something else than the row
    itself and than the right reference; None where there is none.

    Never the row's own: a teacher that has read the row's own result finds every token of it likely. The first, not a
    random one, so that the rows of a group share one prompt, which is then encoded once.

    Args:
        references: of each completion of all processes its text or final answer; None where that could not be read.
        wrong: whether the verifier found it wrong.
        group_size: completions of a prompt, which stand side by side.
        right: the right references of this process's rows.
        first: the number of the first of these rows among the completions.

    Raises:
        ValueError: the lengths differ, or are no multiple of the group's size.
    """
    if len(references) != len(wrong) or len(references) % group_size or first + len(right) > len(references):
        raise ValueError(
            f"{len(references)} references, {len(wrong)} verdicts and {len(right)} rows from {first} on do not make "
            f"groups of {group_size}."
        )
    spoken = [None if text is None else squeeze(text) for text in references]
    chosen: list[str | None] = []
    for row, truth in enumerate(right, start=first):
        excluded = {spoken[row], None, "", None if truth is None else squeeze(truth)}
        start = row - row % group_size
        siblings = range(start, start + group_size)
        chosen.append(next((references[i] for i in siblings if wrong[i] and spoken[i] not in excluded), None))
    return chosen
