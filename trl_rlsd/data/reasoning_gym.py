"""Problems of reasoning-gym (https://github.com/open-thought/reasoning-gym), their answers as privileged context."""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset


def reasoning_gym_dataset(
    name: str, size: int, *, seed: int = 0, system_prompt: str | None = None, **options: Any
) -> Dataset:
    """Distinct problems of one of reasoning-gym's datasets, ready for RLSDTrainer.

    Columns: `prompt` (conversational), `privileged_context` (the reference answer), and `reasoning_gym` (the problem
    as JSON, from which `reasoning_gym_reward` scores). `options` go to the dataset, e.g. `max_digits=1`. The same
    arguments give the same problems.

    Raises:
        ValueError: no such dataset or option, or fewer than `size` distinct problems; the message says how many.
    """
    import reasoning_gym

    # Small settings repeat problems; a repeated one could stand in training and evaluation data at once.
    draws = 20 * size
    try:
        source = reasoning_gym.create_dataset(name, seed=seed, size=draws, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym cannot make {name!r} with {options}: {error}.") from error
    entries: dict[str, dict[str, Any]] = {}
    for index in range(draws):
        entry = source[index]
        entries.setdefault(entry["question"], entry)
        if len(entries) == size:
            break
    if len(entries) < size:
        raise ValueError(
            f"reasoning-gym's {name!r} with {options} gave {len(entries)} distinct problems in {draws} draws, fewer "
            f"than size={size}. Ask for fewer, or widen the options."
        )
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return Dataset.from_list(
        [
            {
                "prompt": [*system, {"role": "user", "content": question}],
                # some tasks have many right answers and give none: such rows keep plain GRPO credit
                "privileged_context": None if entry["answer"] is None else str(entry["answer"]),
                "reasoning_gym": json.dumps(entry, default=str),
            }
            for question, entry in entries.items()
        ]
    )
