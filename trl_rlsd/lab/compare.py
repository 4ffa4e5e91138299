"""The same start on the same problems, with several methods and seeds: what `trl-rlsd compare` does.

    methods x seeds -> runs, each with a result file -> one table, one picture

A result file is written whole, so that an interrupted comparison goes on where it was: finished runs are read, the
others start anew (on a config of the user's: from their last checkpoint).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_rlsd.files import write_whole
from trl_rlsd.lab.builtin import DEFAULT_METHODS, builtin_settings, run_builtin
from trl_rlsd.lab.report import draw, summarise, table
from trl_rlsd.lab.start import start_model
from trl_rlsd.lab.task import ChainTask


RESULT, SETTINGS = "result.json", "settings.json"


@dataclass(frozen=True)
class Run:
    """A method with a seed; `settings`, as JSON, tell it from another run in the same folder."""

    method: str
    seed: int
    settings: dict[str, Any]
    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / RESULT


def compare_builtin(
    output_dir: str,
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: int = 3,
    *,
    task: ChainTask | None = None,
    target: float = 0.5,
    baseline: str | None = None,
    jobs: int | None = None,
    pretraining_steps: int = 4000,
    **options: Any,
) -> str:
    """Compare methods on the built-in task; `options` are those of `builtin_settings`. Returns the table, which also
    stands in `comparison.md`, beside `comparison.png` and `comparison.json`.

    Args:
        seeds: how many, counted from 1.
        baseline: what ratios and differences are taken to; None: grpo, if it is among the methods.
        jobs: runs at a time, each with one thread; None: as many as there are cores, 4 at most.

    Raises:
        ValueError: an option is out of range, a method is unknown, or the folder holds runs of other settings.
        RuntimeError: a run failed; the others are kept, and calling again does the failed ones.
    """
    task = task or ChainTask()
    baseline = baseline or ("grpo" if "grpo" in methods else None)
    check_options(methods, baseline, seeds=seeds, target=target, jobs=jobs, **options)
    options["pretraining_steps"] = pretraining_steps
    runs = [
        Run(method, seed, builtin_settings(method, task, **options), Path(output_dir) / method / f"seed-{seed}")
        for seed in range(1, seeds + 1)
        for method in methods
    ]
    if unfinished(runs):  # a mistake is told before the start is made
        train_runs(runs, str(start_model(task, pretraining_steps)), jobs)
    return report(runs, output_dir, target, baseline)


def check_options(methods: Sequence[str], baseline: str | None, *, target: float, **counts: Any) -> None:
    """What a comparison must know before it spends hours. Raises: ValueError, naming option, value and range."""
    if repeated := sorted({method for method in methods if methods.count(method) > 1}):
        raise ValueError(f"methods has {', '.join(repeated)} more than once.")
    if baseline is not None and baseline not in methods:
        raise ValueError(f"baseline={baseline!r} is not one of the methods: {', '.join(methods)}.")
    if not 0 < target <= 1:
        raise ValueError(f"target={target!r} is out of range; it is a share of right answers, in (0, 1].")
    for name in ("seeds", "steps", "every", "held_out", "problems", "generations", "jobs"):
        if counts.get(name) is not None and counts[name] < 1:
            raise ValueError(f"{name}={counts[name]!r} is out of range; it must be at least 1.")


def train_runs(runs: Sequence[Run], start: str, jobs: int | None = None) -> None:
    """Do those of the runs on the built-in task that have no result yet. Raises: as `compare_builtin`."""
    pending = unfinished(runs)
    jobs = jobs or min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    # a fresh interpreter: threads of a trained parent do not survive a fork
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_worker) as pool:
        for run in pending:
            begin(run)
        tasks = {pool.submit(run_builtin, run.settings, start, run.seed, str(run.folder)): run for run in pending}
        try:
            finish(((tasks[task], task.result) for task in as_completed(tasks)), len(runs), len(runs) - len(pending))
        except KeyboardInterrupt:  # leaving the pool would wait for all runs, begun or not
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def unfinished(runs: Iterable[Run]) -> list[Run]:
    """The runs without a result yet.

    Raises: ValueError, where a run of other settings has ended, or begun, in a run's folder.
    """
    left = []
    for run in runs:
        begun = run.folder / SETTINGS
        known, wanted = (
            json.loads(begun.read_text() if begun.is_file() else "null"),
            json.loads(json.dumps(run.settings)),
        )
        if known is not None and known != wanted:
            raise ValueError(
                f"{run.folder} holds a run of other settings ({_difference(known, wanted)}). Choose another output "
                "folder, or delete this one."
            )
        if not run.result.is_file():
            left.append(run)
    return left


def _worker() -> None:
    """Deaf to Ctrl-C, which the comparison answers for all; gone with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=[multiprocessing.parent_process()], daemon=True).start()


def _leave_with(process: multiprocessing.Process) -> None:
    process.join()
    os.kill(os.getpid(), signal.SIGKILL)


def begin(run: Run) -> None:
    """Say in the run's folder what it is, before there is a checkpoint or a result."""
    write_whole(run.folder / SETTINGS, json.dumps(run.settings, indent=1))


def _difference(known: Any, wanted: Any, name: str = "") -> str:
    if not (isinstance(known, dict) and isinstance(wanted, dict)):
        return f"{name}={known!r}, now {wanted!r}"
    keys = sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key))
    return ", ".join(_difference(known.get(key), wanted.get(key), key) for key in keys)


def finish(results: Iterable[tuple[Run, Callable[[], dict]]], total: int, done: int) -> None:
    """Write each result as it comes, and say so; the failures are told at the end.

    Raises: RuntimeError.
    """
    failed = []
    began = time.perf_counter()
    for run, result in results:
        try:
            value = result()
        except Exception as error:  # another run's result must not be lost with this one
            failed.append(
                f"{run.method} seed {run.seed}: {type(error).__name__}: {error} (see {run.folder / 'log.txt'})"
            )
            continue
        write_whole(run.result, json.dumps(value))
        done += 1
        first, last = value["curve"][0]["sampled"], value["curve"][-1]["sampled"]
        minutes = (time.perf_counter() - began) / 60
        print(
            f"[{done}/{total}] {run.method} seed {run.seed}: {first:.2f} -> {last:.2f} ({minutes:.1f} min)", flush=True
        )
    if failed:
        raise RuntimeError("\n".join([f"{len(failed)} of {total} runs failed; the others are kept.", *failed]))


def report(runs: Sequence[Run], output_dir: str, target: float, baseline: str | None, title: str = "") -> str:
    """Table, picture and numbers of finished runs."""
    folder = Path(output_dir)
    results = [json.loads(run.result.read_text()) for run in runs]
    summaries = summarise(results, target, baseline)
    text = table(summaries, target, baseline)
    write_whole(folder / "comparison.md", text + "\n")
    write_whole(folder / "comparison.json", json.dumps([asdict(summary) for summary in summaries], indent=1) + "\n")
    draw(results, summaries, target, folder / "comparison.png", title or "Held-out problems")
    return text
