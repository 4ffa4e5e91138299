"""Reward by reasoning-gym's own scorers, for rows of `trl_rlsd.data.reasoning_gym`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Any


logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def reasoning_gym_reward(
    prompts: list,
    completions: list,
    reasoning_gym: list[str | None],
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """The scorer's verdict on each completion's answer; 1 is right. Scorers may give partial credit.

    The answer is the last `<answer>...</answer>`; else, where the reference is a number, the last number in the text;
    else the whole text. Rows of other tasks, with None in `reasoning_gym`, get None. So does a completion on which the
    scorer itself fails: that is no wrong answer. TRL's `log_metric` then counts it as `reasoning_gym_failures`.
    """
    rewards: list[float | None] = []
    failures = 0
    for completion, problem in zip(completions, reasoning_gym, strict=True):
        try:
            rewards.append(None if problem is None else score(_text(completion), json.loads(problem)))
        except Exception:
            logger.warning("reasoning-gym's scorer failed on a completion.", exc_info=True)
            rewards.append(None)
            failures += 1
    if log_metric is not None:
        log_metric("reasoning_gym_failures", failures)
    return rewards


def score(text: str, entry: dict[str, Any]) -> float:
    """reasoning-gym's score of a completion's text for one problem (an entry of its datasets)."""
    return float(_scorer(entry["metadata"]["source_dataset"])(extract_answer(text, str(entry["answer"])), entry))


def extract_answer(text: str, reference: str) -> str | None:
    """What of a completion is compared with a reference; None where there is nothing."""
    from reasoning_gym.utils import extract_answer as tagged_answer

    tagged = tagged_answer(text)
    if tagged is not None:
        return tagged
    if _NUMBER.fullmatch(reference):
        return last_number(text)
    return text.strip() or None


def last_number(text: str) -> str | None:
    """The last number in a text, None where there is none: the `contrast_reference` of tasks with numbers."""
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


@cache
def _scorer(name: str):
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(name)


def _text(completion: str | list[dict[str, Any]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""
