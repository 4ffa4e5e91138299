"""Which credit function comes closest to an oracle, where credit is the bottleneck? Hours on 2 cores.

The regime: the built-in task with few facts (90), so that each is met often, and five side computations after each of
three steps, most of them on hard facts: 4 of 111 tokens decide the reward, and few rollouts must tell which. Every
method gets the same learning rates with the same seeds on validation problems; the rate with the highest late accuracy
is then run, with other seeds, on a task with other hard facts, another start and other problems. A method chosen by
its result there needs a further task (`--task-seed 2`). The stored results come from

    known=grpo,oracle,oracle_praise,oracle_blame,rlsd,rlsd_constant
    gates=gate_local,gate_local_dead,gate_causal,gate_causal_dead,gate_causal_dead_shuffled
    python tests/benchmarks/credit_search.py --methods $known,$gates --control gate_causal_dead_shuffled --json FILE \
        --test grpo,oracle,gate_causal_dead,gate_causal_dead_shuffled,gate_local_dead,rlsd_constant
    python tests/benchmarks/credit_search.py --control gate_local_dead_shuffled --json FILE --task-seed 2 \
        --test grpo@1.5e-4,gate_local_dead@1.5e-4,gate_local_dead_shuffled@1.5e-4
    more=gate_refusal,gate_refusal_dead,gate_refusal_shuffled,gate_decided,gate_decided_other,gate_decided_silent
    python tests/benchmarks/credit_search.py --methods grpo,$more --control gate_refusal_shuffled --json FILE \
        --task-seed 3 --test grpo,gate_refusal,gate_refusal_shuffled,oracle@1.5e-4,gate_decided,grpo@7e-5
    python tests/benchmarks/credit_search.py --control gate_decided_shuffled --json FILE --task-seed 4 \
        --test grpo@1.5e-4,gate_decided@1.5e-4,gate_decided_shuffled@1.5e-4
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from candidates import CONTRASTS, GATES

from trl_rlsd.credit import reference_gate
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
    **{name: dict(credit=name, rlsd_lambda=0.9, **CONSTANT) for name in GATES},
    **{name: dict(credit=name, rlsd_lambda=0.9, contrast_fallback="one_sided", **CONSTANT) for name in CONTRASTS},
    **{f"{name}_other": dict(credit=name, rlsd_lambda=0.9, contrast_column="other", **CONSTANT) for name in CONTRASTS},
}


def validation_runs(methods: Iterable[str], folder: Path) -> dict[tuple[str, float], list[Run]]:
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
        for rate in RATES
    }


def _settings(method: str, rate: float, task: ChainTask, split: str) -> dict:
    fields = {**CANDIDATES[method], "learning_rate": rate}
    settings = builtin_settings(fields.pop("credit"), task, **SIZES[split], **BASE, **fields)
    # candidates call what does not stand in their file
    return {**settings, "method": method, "called": [source_hash(dealt_anew), source_hash(reference_gate)]}


def late(run: Run, target: float) -> float:
    """Sampled accuracy as the comparison's table has it."""
    return summarise([json.loads(run.result.read_text())], target, None)[0].sampled.value


def search(methods: list[str], folder: Path, target: float, jobs: int | None) -> tuple[dict, dict[str, float]]:
    """Late accuracy by method and rate on validation problems, and the best rate of each method."""
    grid = validation_runs(methods, folder)
    train_runs([run for runs in grid.values() for run in runs], str(start_model(TASK)), jobs)
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
            folder / name / f"seed-{seed}",
        )
        for seed in range(first, first + TEST_SEEDS)
        for name, (method, rate) in tested.items()
    ]


def methods_with_rates(text: str) -> dict[str, tuple[str, float | None]]:
    """NAME,NAME@RATE -> name -> method and rate; a name has its rate only where that tells two from each other."""
    pairs = [part.partition("@")[::2] for part in text.split(",")]
    methods = [method for method, _ in pairs]
    named = {
        f"{method}@{rate}" if rate and methods.count(method) > 1 else method: (method, float(rate) if rate else None)
        for method, rate in pairs
    }
    if len(named) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text} has one twice")
    return named


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; a mistake is told before anything is trained."""
    parser.add_argument("--folder", type=Path, default=Path("credit-search-output"))
    parser.add_argument("--methods", help="for the search [all; none where --test has all rates]")
    parser.add_argument(
        "--test",
        type=methods_with_rates,
        default={},
        help="NAMEs with commas between, each at the rate that was chosen, or as NAME@RATE",
    )
    parser.add_argument("--task-seed", type=int, default=1, choices=range(1, 10), help="of the test's task [1]")
    parser.add_argument("--control", help="one of them that differences are taken to as well as to grpo")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not 0 < options.target <= 1:
        parser.error(f"--target {options.target} is out of range; it is a share of right answers, in (0, 1]")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs} is out of range; it must be at least 1")
    if options.json and not options.test:
        parser.error("--json keeps the results of --test, which is not given")
    every = [] if options.test and all(rate is not None for _, rate in options.test.values()) else list(CANDIDATES)
    options.methods = options.methods.split(",") if options.methods else every
    if unknown := {*options.methods, *(method for method, _ in options.test.values())} - set(CANDIDATES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(CANDIDATES)}")
    if options.test and "grpo" not in options.test:
        parser.error("--test must have grpo; with several rates, one of them as plain grpo")
    if open_rates := [m for m, rate in options.test.values() if rate is None and m not in options.methods]:
        parser.error(f"--test has {', '.join(open_rates)} without a rate, and --methods does not search it")
    if options.control and options.control not in options.test:
        parser.error(f"--control {options.control} must be one of --test: {', '.join(options.test)}")
    return options


def curve_of(result: dict[str, Any]) -> dict[str, Any]:
    """What a run's held-out problems said while it was trained."""
    names = ("step", "sampled", "greedy", "leak", "length")
    curve = {name: [round(point[name], 4) for point in result["curve"]] for name in names}
    return {"method": result["method"], "seed": result["seed"], **curve}


def main() -> None:
    options = options_of(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    scores: dict[tuple[str, float], float] = {}
    chosen: dict[str, float] = {}
    if options.methods:
        scores, chosen = search(options.methods, options.folder, options.target, options.jobs)
    if not options.test:
        return
    tested = {
        name: (method, chosen[method] if rate is None else rate) for name, (method, rate) in options.test.items()
    }
    task, folder = replace(TASK, seed=options.task_seed), options.folder / f"test-{options.task_seed}"
    runs = test_runs(tested, task, folder)
    train_runs(runs, str(start_model(task)), options.jobs)
    title = "Other facts, start and problems: 4 of 111 tokens decide"
    print(report(runs, str(folder), options.target, "grpo", title))
    if not options.json:
        return
    results = [json.loads(run.result.read_text()) for run in runs]
    result = {
        # a task's own `vars` hold its hard facts, too, once they were asked for
        "task": asdict(task) | {"hard": len(task.hard)},
        "start": fmean(result["curve"][0]["sampled"] for result in results),
        "rates": {name: rate for name, (_, rate) in tested.items()},
        "validation": [{"method": m, "rate": r, "late": score} for (m, r), score in scores.items()],
        "test": json.loads((folder / "comparison.json").read_text()),
        "runs": [curve_of(result) for result in results],
    }
    if options.control:
        against = summarise(results, options.target, options.control)
        result["test_against_control"] = [asdict(summary) for summary in against]
    write_whole(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
