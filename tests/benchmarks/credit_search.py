"""Which credit function comes closest to an oracle, where credit is the bottleneck? Hours on 2 cores.

The regime: the built-in task with few facts (90), so that each is met often, and five side computations after each of
three steps, most of them on hard facts: 4 of 111 tokens decide the reward, and few rollouts must tell which. Every
method gets the same learning rates with the same seeds on validation problems; the rate with the highest late accuracy
is then run, with other seeds, on a task with other hard facts, another start and other problems. What is chosen there
needs a further task (`--task-seed 2`).

    python tests/benchmarks/credit_search.py --test grpo,oracle,NAME --control NAME_shuffled --json FILE
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from candidates import GATES

from trl_rlsd.credit import get_credit
from trl_rlsd.files import write_whole
from trl_rlsd.lab.builtin import builtin_settings
from trl_rlsd.lab.compare import Run, report, train_runs
from trl_rlsd.lab.credit import dealt_anew
from trl_rlsd.lab.report import summarise
from trl_rlsd.lab.start import source_hash, start_model
from trl_rlsd.lab.task import ChainTask


# chosen with GRPO, the oracle, RLSD and two gates on pilots of one seed (101)
TASK = ChainTask(
    chain_length=3, filler_share=0.0, side_computations=5, hard_side_share=0.7, operands=3, base_accuracy=0.27
)
PRETRAINING_STEPS = 4000
RATES = (7e-5, 1.5e-4, 3e-4)
VALIDATION_SEEDS = (103, 104)
TEST_SEEDS = 8
BASE: dict[str, Any] = dict(problems=4, generations=4, imports=["candidates"])
SIZES: dict[str, dict[str, Any]] = {
    "validation": dict(split="validation", steps=80, every=10, held_out=128),
    # longer, so that GRPO has the time to reach the target
    "test": dict(split="test", steps=200, every=20, held_out=256),
}
CONSTANT = dict(rlsd_lambda_decay_steps=0)
CANDIDATES: dict[str, dict] = {
    "grpo": dict(credit="grpo"),
    "oracle": dict(credit="oracle", rlsd_lambda=0.9, **CONSTANT),
    "oracle_praise": dict(credit="oracle", rlsd_lambda=0.9, rlsd_lambda_negative=0.0, **CONSTANT),
    "oracle_blame": dict(credit="oracle", rlsd_lambda=0.0, rlsd_lambda_negative=0.9, **CONSTANT),
    "rlsd": dict(credit="rlsd"),
    "rlsd_contrast": dict(credit="rlsd_contrast", rlsd_lambda=1.0, **CONSTANT),
    "rlsd_constant": dict(credit="rlsd", rlsd_lambda=1.0, **CONSTANT),
    **{name: dict(credit=name, rlsd_lambda=0.9, **CONSTANT) for name in ("rlsd_gate", "rlsd_gate_shuffled", *GATES)},
}


def validation_runs(
    methods: Iterable[str], folder: Path, rates: Iterable[float]
) -> dict[tuple[str, float], list[Run]]:
    """By method and rate."""
    return {
        (method, rate): [
            Run(
                method,
                seed,
                _settings(method, rate, TASK, "validation"),
                folder / "validation" / method / f"{rate:g}-{seed}",
            )
            for seed in VALIDATION_SEEDS
        ]
        for method in methods
        for rate in rates
    }


def _settings(method: str, rate: float, task: ChainTask, split: str) -> dict:
    fields = {**CANDIDATES[method], "learning_rate": rate}
    settings = builtin_settings(fields.pop("credit"), task, **SIZES[split], **BASE, **fields)
    # the controls call what does not stand in their file
    called = [source_hash(function) for function in (dealt_anew, get_credit("rlsd_gate").function)]
    return {**settings, "method": method, "called": called}


def late(run: Run, target: float) -> float:
    """Sampled accuracy as the comparison's table has it."""
    return summarise([json.loads(run.result.read_text())], target, None)[0].sampled.value


def search(methods: list[str], folder: Path, target: float, jobs: int | None) -> tuple[dict, dict[str, float]]:
    """Late accuracy by method and rate on validation problems, and the best rate of each method."""
    grid = validation_runs(methods, folder, RATES)
    train_runs([run for runs in grid.values() for run in runs], str(start_model(TASK, PRETRAINING_STEPS)), jobs)
    scores = {key: fmean(late(run, target) for run in runs) for key, runs in grid.items()}
    chosen = {method: max(RATES, key=lambda rate: scores[method, rate]) for method in methods}
    for method in methods:
        print(f"{method:15}", *(f"{rate:g}: {scores[method, rate]:.3f}" for rate in RATES), f"-> {chosen[method]:g}")
    return scores, chosen


def test_runs(tested: dict[str, tuple[str, float]], task: ChainTask, folder: Path) -> list[Run]:
    """`tested`: name -> method and rate. Each task has seeds of its own."""
    first = 1 + 10 * (task.seed - 1)
    return [
        Run(
            name,
            seed,
            {**_settings(method, rate, task, "test"), "method": name},
            folder / f"test-{task.seed}" / name / f"seed-{seed}",
        )
        for seed in range(first, first + TEST_SEEDS)
        for name, (method, rate) in tested.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="credit-search-output")
    parser.add_argument("--methods", help="for the search [all]")
    parser.add_argument("--test", help="methods for the test: NAME, at the rate that was chosen, or NAME@RATE")
    parser.add_argument("--task-seed", type=int, default=1, choices=range(1, 10), help="of the test's task [1]")
    parser.add_argument("--control", help="one of them that differences are taken to as well as to grpo")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()
    folder = Path(options.folder)
    named = {name: name.partition("@")[::2] for name in (options.test or "").split(",") if name}
    # where all rates are given there is nothing to search
    every = [] if named and all(rate for _, rate in named.values()) else list(CANDIDATES)
    methods = options.methods.split(",") if options.methods else every
    if unknown := {*methods, *(method for method, _ in named.values())} - set(CANDIDATES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(CANDIDATES)}")
    baseline = next((name for name, (method, _) in named.items() if method == "grpo"), None)
    if named and not baseline:
        parser.error(f"--test {options.test} must have grpo")
    if open_rates := [name for name, (method, rate) in named.items() if not rate and method not in methods]:
        parser.error(f"--test has {', '.join(open_rates)} without a rate, and --methods does not search it")
    if options.control and options.control not in named:
        parser.error(f"--control {options.control} must be one of --test {options.test}")
    scores, chosen = search(methods, folder, options.target, options.jobs) if methods else ({}, {})
    if not named:
        return
    tested = {name: (method, float(rate) if rate else chosen[method]) for name, (method, rate) in named.items()}
    task = replace(TASK, seed=options.task_seed)
    runs = test_runs(tested, task, folder)
    train_runs(runs, str(start_model(task, PRETRAINING_STEPS)), options.jobs)
    reported = folder / f"test-{task.seed}"
    print(
        report(
            runs, str(reported), options.target, baseline, "Other facts, start and problems: 4 of 111 tokens decide"
        )
    )
    if options.json:
        result = {
            # a task's own `vars` hold its hard facts, too, once they were asked for
            "tasks": {
                split: asdict(which) | {"hard": len(which.hard)}
                for split, which in (("validation", TASK), ("test", task))
            },
            "configurations_on_validation": len(scores),
            "configurations_on_test": len(tested),
            "validation": [{"method": m, "rate": r, "late": score} for (m, r), score in scores.items()],
            "rates": {name: rate for name, (_, rate) in tested.items()},
            "test": json.loads((reported / "comparison.json").read_text()),
        }
        if options.control:
            results = [json.loads(run.result.read_text()) for run in runs]
            against = summarise(results, options.target, options.control)
            result["test_against_control"] = [asdict(summary) for summary in against]
        write_whole(Path(options.json), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
