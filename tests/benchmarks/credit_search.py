"""Which credit function comes closest to an oracle, where credit is the bottleneck? Hours on 2 cores.

The regime: the built-in task with four side computations after each of three steps, so that 4 of 93 tokens decide the
reward, and few rollouts. Every method gets the same three learning rates with the same seeds on validation problems;
the rate with the highest late accuracy is then run on test problems with other seeds. Nothing is chosen on test.

    python tests/benchmarks/credit_search.py --json tests/benchmarks/results/credit_search.json [--methods a,b]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from trl_rlsd.lab.builtin import builtin_settings
from trl_rlsd.lab.compare import Run, report, train_runs, write
from trl_rlsd.lab.start import start_model
from trl_rlsd.lab.task import ChainTask


TASK = ChainTask(chain_length=3, filler_share=0.0, side_computations=4)
PRETRAINING_STEPS = 4000
RATES = (1.5e-4, 3e-4, 6e-4)
VALIDATION_SEEDS = (101, 102)
TEST_SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
BASE = dict(problems=4, generations=4, steps=100, imports=["candidates"])
CONSTANT = dict(rlsd_lambda_decay_steps=0)
BLAME = dict(rlsd_lambda=0.0, rlsd_lambda_negative=0.9, **CONSTANT)
CANDIDATES: dict[str, dict] = {
    "grpo": dict(credit="grpo"),
    "oracle": dict(credit="oracle", rlsd_lambda=0.9, **CONSTANT),
    "oracle_praise": dict(credit="oracle", rlsd_lambda=0.9, rlsd_lambda_negative=0.0, **CONSTANT),
    "oracle_blame": dict(credit="oracle", **BLAME),
    "rlsd": dict(credit="rlsd"),
    "rlsd_contrast": dict(credit="rlsd_contrast", rlsd_lambda=1.0, **CONSTANT),
    "rlsd_blame": dict(credit="rlsd", rlsd_reweight_clip_range_negative=4.0, **BLAME | dict(rlsd_lambda_negative=1.0)),
    "gate_blame": dict(credit="gate_toward", **BLAME),
    "drop_blame": dict(credit="gate_drop", **BLAME),
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
    sizes = dict(every=25, held_out=128) if split == "validation" else dict(every=20, held_out=256)
    fields = {**CANDIDATES[method], "learning_rate": rate}
    credit = fields.pop("credit")
    return {**builtin_settings(credit, TASK, split=split, **BASE, **sizes, **fields), "method": method}


def late(run: Run) -> float:
    """Sampled accuracy on the mean of the last three measurements."""
    return fmean(point["sampled"] for point in json.loads(run.result.read_text())["curve"][-3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="credit-search-output")
    parser.add_argument("--methods", help="for the search [all]")
    parser.add_argument("--rates", help="[1.5e-4,3e-4,6e-4]")
    parser.add_argument(
        "--test", help="methods for the test, with the rates that validation chose; grpo and oracle too"
    )
    parser.add_argument("--target", type=float, default=0.42)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()
    folder = Path(options.folder)
    methods = options.methods.split(",") if options.methods else list(CANDIDATES)
    rates = [float(rate) for rate in options.rates.split(",")] if options.rates else RATES
    start = str(start_model(TASK, PRETRAINING_STEPS))
    grid = validation_runs(methods, folder, rates)
    train_runs([run for runs in grid.values() for run in runs], start, options.jobs)
    scores = {key: fmean(map(late, runs)) for key, runs in grid.items()}
    chosen = {method: max(rates, key=lambda rate: scores[method, rate]) for method in methods}
    for method in methods:
        print(f"{method:15}", *(f"{rate:g}: {scores[method, rate]:.3f}" for rate in rates), f"-> {chosen[method]:g}")
    if not options.test:
        return
    tested = options.test.split(",")
    if "grpo" not in tested or not set(tested) <= set(methods):
        parser.error(
            f"--test {options.test} must have grpo, and no method that was not searched: {', '.join(methods)}"
        )
    runs = [
        Run(method, seed, _settings(method, chosen[method], "test"), folder / "test" / method / f"seed-{seed}")
        for seed in TEST_SEEDS
        for method in tested
    ]
    train_runs(runs, start, options.jobs)
    print(report(runs, str(folder), options.target, "grpo", "Held-out problems, 4 of 93 tokens decide"))
    if options.json:
        result = {
            "task": vars(TASK) | {"hard": len(TASK.hard)},
            "configurations_on_validation": len(grid),
            "configurations_on_test": len(tested),
            "validation": [{"method": m, "rate": r, "late": score} for (m, r), score in scores.items()],
            "rates": chosen,
            "test": json.loads((folder / "comparison.json").read_text()),
        }
        write(Path(options.json), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
