"""Seconds to grade completions, after the processes have started: math (with a share of hard ones), choice, JSON, SQL.

    python tests/benchmarks/rewards.py [--json FILE]

Absolute times hold for the machine that they were taken on; they are here because a reward must not hold training up.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median

from trl_rlsd.rewards.choice import choice_reward
from trl_rlsd.rewards.json_schema import JSONSchemaReward
from trl_rlsd.rewards.math import math_reward
from trl_rlsd.rewards.sql import SQLReward


COUNT, TURNS = 1000, 5
SCHEMA = json.dumps({"type": "object", "required": ["total"], "properties": {"total": {"type": "number"}}})
SCRIPT = "CREATE TABLE sale (seller TEXT, amount INT);" + "".join(
    f"INSERT INTO sale VALUES ('s{i % 20}', {i});" for i in range(200)
)
MATH = [
    ("{n}", "In May she sold half as many as in April, together {n}.\nThe answer is {n}."),
    ("\\frac{{{n}\\pi}}{{4}}", "<think>the sine is positive</think> The angle is \\boxed{{\\frac{{{n}}}{{4}}\\pi}}."),
    ("[0, {n}) \\cup (2000000, \\infty)", "So $x \\in$ \\boxed{{[0,{n}) \\cup (2000000,\\infty)}}."),
    ("x^2 + 2 \\cdot {n}x + {n}^2", "Expanding gives \\boxed{{(x+{n})^2}}."),
    ("{n}", "Doubling ten times gives 2, 4, 8, 16, and so on until {n}"),
    ("0.5", "no idea"),
]


def jobs(turn: int) -> dict[str, tuple]:
    """Reward, completions and columns by name. Half of a group of eight is wrong; no turn repeats a problem of math,
    whose verdicts are kept."""
    numbers = [1000 * turn + i // 8 + 1 for i in range(COUNT)]
    math = [[part.format(n=n) for part in MATH[n % len(MATH)]] for n in numbers]
    wrong = [text if i % 2 else text + f" No: \\boxed{{{i}}}" for i, (_, text) in enumerate(math)]
    sums = "SELECT seller, SUM(amount) FROM sale WHERE amount > {} GROUP BY seller"
    return {
        "math": (math_reward, wrong, {"answer": [reference for reference, _ in math]}),
        "choice": (
            choice_reward,
            [f"Clear.\nAnswer: {'ABCD'[i % 4]}" for i in range(COUNT)],
            {"answer": ["B"] * COUNT},
        ),
        "json": (
            JSONSchemaReward(),
            [f'```json\n{{"total": {i}}}\n```' for i in range(COUNT)],
            {"schema": [SCHEMA] * COUNT},
        ),
        "sql": (
            SQLReward(schema_column="schema"),
            [f"```sql\n{sums.format(i % 8)}\n```" for i in range(COUNT)],
            {"schema": [SCRIPT] * COUNT, "query": [sums.format(3)] * COUNT},
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="unused; benchmarks are called alike")
    parser.add_argument("--json")
    options = parser.parse_args()
    seconds = {}
    for name, (reward, completions, columns) in jobs(0).items():
        reward(None, completions[:8], **{column: values[:8] for column, values in columns.items()})
        turns = []
        for turn in range(1, TURNS + 1):
            reward, completions, columns = jobs(turn)[name]
            began = time.perf_counter()
            rewards = reward(None, completions, **columns)
            turns.append(time.perf_counter() - began)
        seconds[name] = median(turns)
        right = sum(reward == 1 for reward in rewards)
        print(f"{name:8} {COUNT} completions: {seconds[name]:.2f} s ({right} right, {rewards.count(None)} not judged)")
    if options.json:
        result = {"completions": COUNT, "seconds": seconds, "cores": len(os.sched_getaffinity(0))}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
