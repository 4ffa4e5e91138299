"""Which credit function comes closest to an oracle, where credit is the bottleneck? Hours on 2 cores.

The regime: the built-in task with few facts (90), so that all are met in every step of training, and five side
computations after each of three steps, most of them on hard facts: 4 of 111 tokens decide the reward, and few rollouts
must tell which. Every method gets the same three learning rates with the same seeds on validation problems; the rate
with the highest late accuracy is then run on test problems with other seeds, for longer. Nothing is chosen on test.

    python tests/benchmarks/credit_search.py --json tests/benchmarks/results/credit_search.json [--methods a,b]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from trl_rlsd.files import write_whole
from trl_rlsd.lab.builtin import builtin_settings
from trl_rlsd.lab.compare import Run, report, train_runs
from trl_rlsd.lab.start import start_model
from trl_rlsd.lab.task import ChainTask


TASK = ChainTask(
    chain_length=3, filler_share=0.0, side_computations=5, hard_side_share=0.7, operands=3, base_accuracy=0.27
)
PRETRAINING_STEPS = 4000
RATES = (1e-4, 2e-4, 4e-4)
VALIDATION_SEEDS = (103, 104)  # the task was chosen with GRPO, the oracle and seed 101
TEST_SEEDS = (1, 2, 3, 4, 5, 6)
BASE = dict(problems=4, generations=4, imports=["candidates"])
SPLITS = {
    "validation": dict(split="validation", steps=80, every=20, held_out=128),
    "test": dict(split="test", steps=100, every=10, held_out=256),
}
CONSTANT = dict(rlsd_lambda_decay_steps=0)
BLAME = dict(rlsd_lambda=0.0, rlsd_lambda_negative=0.9, **CONSTANT)
CANDIDATES: dict[str, dict] = {
    "grpo": dict(credit="grpo"),
    "oracle": dict(credit="oracle", rlsd_lambda=0.9, **CONSTANT),
    "oracle_praise": dict(credit="oracle", rlsd_lambda=0.9, rlsd_lambda_negative=0.0, **CONSTANT),
    "oracle_blame": dict(credit="oracle", **BLAME),
    "rlsd": dict(credit="rlsd"),
    "rlsd_contrast": dict(credit="rlsd_contrast", rlsd_lambda=1.0, **CONSTANT),
    "gate_drop": dict(credit="gate_drop", rlsd_lambda=0.9, **CONSTANT),
    "gate_drop_sharp": dict(credit="gate_drop_sharp", rlsd_lambda=0.9, **CONSTANT),
    "gate_drop_shuffled": dict(credit="gate_drop_shuffled", rlsd_lambda=0.9, **CONSTANT),
    "rlsd_gate": dict(credit="rlsd_gate", rlsd_lambda=0.9, **CONSTANT),
    "gate_closed": dict(credit="gate_closed", rlsd_lambda=0.9, **CONSTANT),
    "gate_shuffled": dict(credit="gate_shuffled", rlsd_lambda=0.9, **CONSTANT),
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
                _settings(method, rate, "validation"),
                folder / "validation" / method / f"{rate:g}-{seed}",
            )
            for seed in VALIDATION_SEEDS
        ]
        for method in methods
        for rate in rates
    }


def _settings(method: str, rate: float, split: str) -> dict:
    fields = {**CANDIDATES[method], "learning_rate": rate}
    credit = fields.pop("credit")
    return {**builtin_settings(credit, TASK, **SPLITS[split], **BASE, **fields), "method": method}


def late(run: Run) -> float:
    """Sampled accuracy on the mean of the last three measurements."""
    return fmean(point["sampled"] for point in json.loads(run.result.read_text())["curve"][-3:])


def search(methods: list[str], folder: Path, start: str, jobs: int | None) -> tuple[dict, dict[str, float]]:
    """Late accuracy by method and rate on validation problems, and the best rate of each method."""
    grid = validation_runs(methods, folder, RATES)
    train_runs([run for runs in grid.values() for run in runs], start, jobs)
    scores = {key: fmean(map(late, runs)) for key, runs in grid.items()}
    chosen = {method: max(RATES, key=lambda rate: scores[method, rate]) for method in methods}
    for method in methods:
        print(f"{method:15}", *(f"{rate:g}: {scores[method, rate]:.3f}" for rate in RATES), f"-> {chosen[method]:g}")
    return scores, chosen


def test_runs(tested: dict[str, tuple[str, float]], folder: Path) -> list[Run]:
    """`tested`: name -> method and rate."""
    return [
        Run(name, seed, {**_settings(method, rate, "test"), "method": name}, folder / "test" / name / f"seed-{seed}")
        for seed in TEST_SEEDS
        for name, (method, rate) in tested.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="credit-search-output")
    parser.add_argument("--methods", help="for the search [all]")
    parser.add_argument("--test", help="methods for the test: NAME, at the rate that was chosen, or NAME@RATE")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()
    folder = Path(options.folder)
    methods = options.methods.split(",") if options.methods else list(CANDIDATES)
    named = {name: name.partition("@")[::2] for name in (options.test or "").split(",") if name}
    if named and ("grpo" not in named or not {method for method, _ in named.values()} <= set(methods)):
        parser.error(f"--test {options.test} must have grpo, and no method that is not searched: {', '.join(methods)}")
    start = str(start_model(TASK, PRETRAINING_STEPS))
    scores, chosen = search(methods, folder, start, options.jobs)
    if not named:
        return
    tested = {name: (method, float(rate) if rate else chosen[method]) for name, (method, rate) in named.items()}
    runs = test_runs(tested, folder)
    train_runs(runs, start, options.jobs)
    print(report(runs, str(folder), options.target, "grpo", "Held-out problems, 4 of 111 tokens decide"))
    if options.json:
        result = {
            "task": vars(TASK) | {"hard": len(TASK.hard)},
            "configurations_on_validation": len(scores),
            "configurations_on_test": len(tested),
            "validation": [{"method": m, "rate": r, "late": score} for (m, r), score in scores.items()],
            "rates": {name: rate for name, (_, rate) in tested.items()},
            "test": json.loads((folder / "comparison.json").read_text()),
        }
        write_whole(Path(options.json), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
