"""Verifiable rewards, by name. `get_reward("name")` or `get_reward("package.module.function")`.

Every reward has TRL's signature, `(prompts, completions, **columns) -> list[float | None]`; None says that the grader
could not judge, which is not the same as a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

from trl_rlsd.dotted import find


# TRL's own are used as they are; nothing of theirs is written again.
REWARDS = {
    "math_reward": "trl_rlsd.rewards.math.math_reward",
    "choice_reward": "trl_rlsd.rewards.choice.choice_reward",
    "code_reward": "trl_rlsd.rewards.code.code_reward",
    "sql_reward": "trl_rlsd.rewards.sql.sql_reward",
    "json_schema_reward": "trl_rlsd.rewards.json_schema.json_schema_reward",
    "reasoning_gym_reward": "trl_rlsd.rewards.reasoning_gym.reasoning_gym_reward",
    "accuracy_reward": "trl.rewards.accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards.reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards.think_format_reward",
}

# TRL's makers of rewards; what they are given are the options
_MADE = {
    "soft_overlong_punishment": "trl.rewards.get_soft_overlong_punishment",
    "repetition_penalty_reward": "trl.rewards.get_repetition_penalty_reward",
    "cosine_scaled_reward": "trl.rewards.get_cosine_scaled_reward",
}
REWARDS |= _MADE


def get_reward(name: str, options: Mapping[str, Any] | None = None) -> Callable[..., list[float | None]]:
    """The reward function of a registered name or a dotted path, with options of its own.

    Raises:
        ValueError: there is no such function or option; the message lists those that there are.
    """
    path = REWARDS.get(name, name)
    try:
        reward = find(path)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The reward {name!r} cannot be loaded: {error}. Install what it needs, or mend the path."
        ) from error
    if not callable(reward):
        raise ValueError(
            f"{name!r} is neither a registered reward ({', '.join(REWARDS)}) nor the dotted path of a function, such "
            "as 'my_package.rewards.my_reward'."
        )
    options, made = dict(options or {}), name in _MADE
    if not options and not made:
        return reward
    if _has_options(reward):
        known = {field.name: getattr(reward, field.name) for field in fields(reward)}
    else:
        takes = signature(reward).parameters.values()
        known = {p.name: p.default for p in takes if made or p.kind is p.KEYWORD_ONLY}
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}.")
    if _has_options(reward):
        return replace(reward, **{option: _within(known[option], value) for option, value in options.items()})
    if not made:
        return partial(reward, **options)
    if lacking := [option for option in known if known[option] is Parameter.empty and option not in options]:
        raise ValueError(f"{name!r} needs the option {lacking[0]!r}; it has {', '.join(known)}.")
    return reward(**options)


def _has_options(thing: Any) -> bool:
    """Whether its options are its fields; those of a class have no values yet."""
    return is_dataclass(thing) and not isinstance(thing, type)


def _within(default: Any, value: Any) -> Any:
    """An option that has fields of its own, such as `limits`, may give some of them."""
    return replace(default, **value) if _has_options(default) and isinstance(value, Mapping) else value
