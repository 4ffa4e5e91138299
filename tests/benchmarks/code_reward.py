"""How long does `code_reward` take for 200 completions? The bar: 30 s on 2 cores.

    python tests/benchmarks/code_reward.py [--workers 2] [--endless 4] [--json FILE]

The rows are as datasets have them, a quarter each: three asserts (MBPP), a longer test function (HumanEval), ten
stdin cases and ten calls (APPS, TACO). Of the programs, --endless never end, a third of the others is wrong, and a
tenth is no Python. An endless program costs `Limits.cpu_seconds` of a core: 5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

from trl_rlsd.files import write_whole
from trl_rlsd.rewards.code import CodeReward


ROWS = 200
BAR = 30.0
RIGHT = """
from collections import Counter

def modes(numbers):
    counts = Counter(numbers)
    most = max(counts.values(), default=0)
    return sorted(n for n, count in counts.items() if count == most)
"""
WRONG = RIGHT.replace("sorted(", "list(").replace("max(", "min(")
ENDLESS = RIGHT.replace("    counts =", "    while True: pass\n    counts =")
BROKEN = RIGHT.replace("def modes(numbers):", "def modes(numbers)")
PRINT = "\nif __name__ == '__main__':\n    input()\n    print(*modes(map(int, input().split())))\n"
LISTS = [[i % 7, 3, (i * i) % 5, 3, i % 2, i % 7, 1 + i] for i in range(10)]


def tests() -> list:
    right: dict = {}
    exec(RIGHT, right)
    modes = [right["modes"](numbers) for numbers in LISTS]
    asserts = [f"assert modes({n}) == {m}" for n, m in zip(LISTS, modes, strict=True)]
    checks = "".join(f"    {line.replace('modes', 'candidate')}\n" for line in asserts)
    return [
        asserts[:3],
        f"def check(candidate):\n{checks}\ncheck(modes)",
        {
            "inputs": [f"{len(numbers)}\n{' '.join(map(str, numbers))}\n" for numbers in LISTS],
            "outputs": [" ".join(map(str, numbers)) + "\n" for numbers in modes],
        },
        json.dumps({"fn_name": "modes", "inputs": [[numbers] for numbers in LISTS], "outputs": modes}),
    ]


def program(row: int, endless: int) -> str:
    if row < endless:
        source = ENDLESS
    elif row % 10 == 9:
        source = BROKEN
    else:
        source = WRONG if row % 3 == 0 else RIGHT
    return f"<think>\nCount, then compare.\n</think>\nA counter does it.\n```python{source}{PRINT}```\n"


def cpu_seconds() -> float:
    """Of this process and the sandboxes that ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="unused; benchmarks are called alike")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--endless", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    reward = CodeReward(workers=args.workers)
    reward.check()
    completions, column = [program(row, args.endless) for row in range(ROWS)], tests() * (ROWS // 4)
    start, before = time.perf_counter(), cpu_seconds()
    rewards = reward(None, completions, tests=column)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    expected = [float(RIGHT in completion) for completion in completions]
    result = {
        "rows": ROWS,
        "endless": args.endless,
        "workers": args.workers,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "bar": BAR,
        "verdicts": rewards == expected,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        write_whole(args.json, json.dumps(result, indent=2) + "\n")
    sys.exit(seconds > BAR or rewards != expected)


if __name__ == "__main__":
    main()
