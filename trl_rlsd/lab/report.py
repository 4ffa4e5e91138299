"""Finished runs of several methods and seeds as one table and one picture. Pure functions; needs numpy and scipy.

A run is a dict:

    method, seed, steps   name; integer; number of optimizer steps
    curve                 measurements on held-out problems, the first before training: `step`, `sampled`, `greedy`,
                          `length`, `entropy`, `leak`; the last four are None where not measured
    step_seconds          one per optimizer step
    localisation          `auc` (or None), `share`, `uniform_share`; or None

Accuracies, leak and shares lie in [0, 1], lengths are in tokens, entropy in nats; nan counts as not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap


Run = dict[str, Any]
LATE = ("sampled", "greedy", "length", "entropy", "leak")
# Okabe-Ito without yellow, which is lost on white; 7 and 5 have no common divisor, so 35 methods differ in the pair
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (7, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
WIDTH = 1200  # pixels


@dataclass(frozen=True)
class Estimate:
    """A value over seeds and its 95 % percentile bootstrap interval, None with one seed. A `bound` is of both."""

    value: float
    interval: tuple[float, float] | None = None
    bound: str = ""


@dataclass(frozen=True)
class MethodSummary:
    """One method over its seeds, see [`summarise`]; None: not measured, not defined. Metadata: table columns."""

    method: str
    seeds: int
    reached: int
    steps: Estimate = field(metadata={"steps to {:.3g}": ".0f"})
    pairs: int
    ratio: Estimate | None = field(metadata={"x steps": ".2f"})
    sampled: Estimate = field(metadata={"sampled": ".0%"})
    difference: Estimate | None = field(metadata={"diff": "+z.0%"})
    greedy: Estimate | None = field(metadata={"greedy": ".0%"})
    greedy_difference: Estimate | None  # of the numbers alone: the table is wide enough
    peak_greedy: float | None = field(metadata={"peak": ".0%"})
    length: float | None = field(metadata={"length": ".0f"})
    entropy: float | None = field(metadata={"entropy": ".2f"})
    leak: float | None = field(metadata={"leak": ".1%"})
    highest_leak: float | None = field(metadata={"max": ".1%"})
    seconds: float | None = field(metadata={"s/step": ".2f"})
    seconds_ratio: float | None = field(metadata={"x s": ".2f"})
    auc: float | None = field(metadata={"AUC": ".2f"})
    share: float | None = field(metadata={"share": ".1%"})
    uniform_share: float | None = field(metadata={"even": ".1%"})


def steps_to_target(curve: Sequence[dict[str, Any]], target: float) -> float | None:
    """The step at which sampled accuracy reaches the target, not by one lucky measurement; None if it never does.

    Measurement i holds if y_i >= target and (y_i + y_{i+1}) / 2 >= target; the last one has no next and holds alone.
    With i the first that holds, the result is where the straight line from measurement i - 1 to i meets the target, or
    the step of i if it is the very first. A higher target is never reached earlier. On a straight line from 0 at step
    0 to 1 at step 100, a target of 0.25 gives 25.

    Units: steps. Raises: `ValueError` on a target outside (0, 1] and on a curve that cannot be used.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target must lie in (0, 1], got {target}; it is a share of right answers")
    _check_curve(curve, "the curve")
    points = [(point["step"], point["sampled"]) for point in curve]
    for i, (step, y) in enumerate(points):
        following = points[i + 1][1] if i + 1 < len(points) else y
        if y >= target and y + following >= 2 * target:
            # the one before lies below the target: else it would have held, with this one as its next
            earlier, below = points[i - 1] if i else (step, y - 1)
            return float(earlier + (step - earlier) * ((target - below) / (y - below)))
    return None


def summarise(runs: Sequence[Run], target: float, baseline: str | None) -> list[MethodSummary]:
    """One summary a method, in the order of first appearance. The order of its seeds does not matter.

    - `steps`: mean over seeds of [`steps_to_target`], a run that never `reached` it counted at its number of steps;
      the bound is then ">=". Without any run that did there is no interval.
    - `ratio`: mean steps / the baseline's mean steps, over the `pairs` seeds that both have, resampled together. The
      bound is ">=" where a run of the method never reached the target, "<=" where one of the baseline's; where both,
      or with a baseline of 0 steps, there is no ratio.
    - `sampled`, `greedy`, `length`, `entropy`, `leak`: mean over the last 3 measurements (the last third if there are
      fewer than 9; at least the last), then over seeds. `difference`, of `sampled`, and
      `greedy_difference`: minus the baseline's, over the pairs.
    - `peak_greedy`: maximum of the mean curve, so flattered by noise. `highest_leak`: of any measurement of any seed.
    - `seconds`: median of all steps of all seeds; `seconds_ratio`: to the baseline's.
    - `auc`, `share`, `uniform_share`: means over seeds.

    Raises: `ValueError` without runs, on a seed given twice, a curve that cannot be used, seeds measured at different
    steps, a target outside (0, 1], a baseline without runs.
    """
    groups = _groups(runs)
    if baseline is not None and baseline not in groups:
        raise ValueError(f"baseline {baseline!r} has no runs; pass one of {list(groups)}, or None")
    return [_summary(method, own, groups.get(baseline, {}), target) for method, own in groups.items()]


def _summary(method: str, own: dict[int, Run], against: dict[int, Run], target: float) -> MethodSummary:
    runs = list(own.values())
    pairs = [(run, against[seed]) for seed, run in own.items() if seed in against]
    steps, censored = _counted_steps(runs, target)
    late = {key: _values(_late(run, key) for run in runs) for key in LATE}
    local = [run.get("localisation") or {} for run in runs]
    seconds, others = (
        _mean((s for run in group.values() for s in run["step_seconds"]), np.median) for group in (own, against)
    )
    return MethodSummary(
        method=method,
        seeds=len(runs),
        reached=len(runs) - sum(censored),
        steps=_estimate(np.mean, steps, censored=censored),
        pairs=len(pairs),
        ratio=_steps_ratio(pairs, target),
        difference=_difference(pairs, "sampled"),
        greedy_difference=_difference(pairs, "greedy"),
        sampled=_estimate(np.mean, late["sampled"]),
        greedy=_estimate(np.mean, late["greedy"]),
        peak_greedy=max(_mean_curve(runs, "greedy")[1], default=None),
        length=_mean(late["length"]),
        entropy=_mean(late["entropy"]),
        leak=_mean(late["leak"]),
        highest_leak=max(_values(point.get("leak") for run in runs for point in run["curve"]), default=None),
        seconds=seconds,
        seconds_ratio=seconds / others if seconds is not None and others else None,
        auc=_mean(one.get("auc") for one in local),
        share=_mean(one.get("share") for one in local),
        uniform_share=_mean(one.get("uniform_share") for one in local),
    )


def _difference(pairs: list[tuple[Run, Run]], key: str) -> Estimate | None:
    late = [(_late(run, key), _late(other, key)) for run, other in pairs]
    return _estimate(np.mean, [own - theirs for own, theirs in late if None not in (own, theirs)])


def _steps_ratio(pairs: list[tuple[Run, Run]], target: float) -> Estimate | None:
    steps, censored = _counted_steps([run for run, _ in pairs], target)
    others, others_censored = _counted_steps([other for _, other in pairs], target)
    if (any(censored) and any(others_censored)) or not sum(others):
        return None
    bound = dict(censored=censored) if any(censored) else dict(censored=others_censored, bound="<=")
    return _estimate(lambda first, second, axis=-1: first.mean(axis) / second.mean(axis), steps, others, **bound)


def _estimate(statistic: Callable, *samples: Sequence[float], censored: Sequence[bool] = (), bound: str = ">="):
    """Seeds are resampled together in all samples. No interval where runs that merely ended are all there is, or where
    a resample may have 0 steps to divide by."""
    if not samples[0]:
        return None
    ends = None
    if len(samples[0]) > 1 and not (censored and all(censored)) and not any(0 in divisor for divisor in samples[1:]):
        options = dict(paired=True, vectorized=True, method="percentile", rng=np.random.default_rng(0))
        low, high = bootstrap(samples, statistic, **options).confidence_interval
        ends = float(low), float(high)
    return Estimate(float(statistic(*map(np.array, samples))), ends, bound if any(censored) else "")


def _counted_steps(runs: Iterable[Run], target: float) -> tuple[list[float], list[bool]]:
    """Steps, and which of them are only where the run ended."""
    found = [(run["steps"], steps_to_target(run["curve"], target)) for run in runs]
    return [float(end) if at is None else at for end, at in found], [at is None for _, at in found]


def _values(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _mean(values: Iterable[float | None], reduce: Callable = np.mean) -> float | None:
    there = _values(values)
    return float(reduce(there)) if there else None


def _late(run: Run, key: str) -> float | None:
    return _mean(point.get(key) for point in run["curve"][-max(1, min(3, len(run["curve"]) // 3)) :])


def _mean_curve(runs: Iterable[Run], key: str) -> tuple[list[float], ...]:
    """Steps at which any seed has a value; there mean, minimum and maximum over seeds."""
    together = zip(*(run["curve"] for run in runs), strict=True)
    there = [(points[0]["step"], _values(point.get(key) for point in points)) for points in together]
    rows = [(step, _mean(values), min(values), max(values)) for step, values in there if values]
    return tuple(map(list, zip(*rows, strict=True))) or ([], [], [], [])


def _groups(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """method -> seed -> run, checked; seeds ascend."""
    if not runs:
        raise ValueError("no runs to report; pass at least one finished run")
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        own, whose = groups.setdefault(run["method"], {}), f"method {run['method']!r}, seed {run['seed']}"
        if run["seed"] in own:
            raise ValueError(f"{whose} is there twice; give every run of a method its own seed")
        _check_curve(run["curve"], whose)
        first = next(iter(own.values()), run)
        if apart := {point["step"] for point in run["curve"]} ^ {point["step"] for point in first["curve"]}:
            raise ValueError(
                f"{whose} and seed {first['seed']} differ in the measured steps {sorted(apart)}; measure all runs of a"
                " method at the same steps"
            )
        own[run["seed"]] = run
    return {method: dict(sorted(own.items())) for method, own in groups.items()}


def _check_curve(curve: Sequence[dict[str, Any]], whose: str) -> None:
    steps = [point["step"] for point in curve]
    if not steps:
        raise ValueError(f"{whose} has no measurements; measure at least once")
    if steps != sorted(set(steps)):
        raise ValueError(f"{whose} has steps that do not ascend, {steps}; sort them, one measurement a step")
    for point in curve:
        if point["sampled"] is None or not 0 <= point["sampled"] <= 1:
            raise ValueError(f"{whose} has sampled={point['sampled']} at step {point['step']}; give a share in [0, 1]")


def table(summaries: Sequence[MethodSummary], target: float, baseline: str | None) -> str:
    """A Markdown table that is aligned for a terminal, too, and its foot. A column without any value is left out.

    Accuracies, leak and shares are printed in %, so 0.703 becomes 70; the summaries hold every digit.
    """
    columns = {"method": [one.method for one in summaries]}
    columns["seeds"] = [f"{one.reached}/{one.seeds}" for one in summaries]
    for column in fields(MethodSummary):
        for header, form in column.metadata.items():
            cells = [_cell(getattr(one, column.name), form) for one in summaries]
            columns |= {header.format(100 * target): cells} if set(cells) != {"-"} else {}
    widths = [max(map(len, (header, *cells))) for header, cells in columns.items()]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (columns, rule, *zip(*columns.values(), strict=True)):
        first, *others = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("|".join(["", first.strip().ljust(widths[0]), *others, ""]))
    lines += [
        "",
        f"n = {' or '.join(map(str, sorted({one.seeds for one in summaries})))} seeds a method. In brackets: 95 %"
        " percentile bootstrap interval over seeds; with few seeds it is too narrow, with one there is none.",
        "seeds: reached the target / all. >=: a run that never did counts with its number of steps, so this is a lower"
        " bound (<=: an upper one).",
        "In %: sampled and greedy (late in the run), diff, peak (of mean greedy), leak and its max, share, even.",
    ]
    if baseline is not None:
        lines.append(f"x: ratio to {baseline}. diff: sampled minus {baseline}'s. x steps and diff are paired by seed.")
    return "\n".join(lines) + "\n"


def _cell(value: Estimate | float | None, form: str) -> str:
    if value is None:
        return "-"
    one = value if isinstance(value, Estimate) else Estimate(value)
    ends = ",".join(format(end, form) for end in one.interval or ())
    return f"{one.bound}{one.value:{form}}{f' [{ends}]' if ends else ''}".replace("%", "")


def draw(runs: Sequence[Run], summaries: Sequence[MethodSummary], target: float, path: Path, title: str) -> None:
    """Sampled and greedy accuracy, and leak rate (length where no leak was measured) over steps, with a band from the
    lowest to the highest seed; steps to the target with intervals. A PNG, 1200 pixels wide."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _groups(runs)
    looks = {
        one.method: dict(color=COLOURS[i % len(COLOURS)], linestyle=STYLES[i % len(STYLES)], linewidth=2)
        for i, one in enumerate(summaries)
    }
    leak = any(one.highest_leak is not None for one in summaries)
    third = dict(leak="leak rate") if leak else dict(length="completion length, tokens")
    labels = dict(sampled="sampled accuracy", greedy="greedy accuracy", **third)
    figure, grid = pyplot.subplots(2, 2, figsize=(WIDTH / 120, 6 + 0.2 * len(looks)), layout="constrained")
    for axes, (key, label) in zip(grid.flat, labels.items(), strict=False):
        for method, look in looks.items():
            steps, mean, low, high = _mean_curve(groups[method].values(), key)
            axes.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
            axes.plot(steps, mean, label=method, marker="o", markersize=3, **look)
        axes.set(xlabel="optimizer step", ylabel=label, ylim=(0, None if key in third else 1.02))
    grid[0, 0].axhline(target, color="#666666", linewidth=1, zorder=0, label=f"target {target:g}")
    dots = grid[1, 1]
    for row, one in enumerate(summaries):
        value, look = one.steps.value, looks[one.method]
        dots.plot(one.steps.interval or (value, value), (row, row), marker="|" if one.steps.interval else "", **look)
        marker = dict(marker=">", markerfacecolor="white") if one.steps.bound else dict(marker="o")
        dots.plot(value, row, color=look["color"], markersize=7, **marker)
        dots.text(0.01, row - 0.38, one.method, transform=dots.get_yaxis_transform(), va="center", fontsize=8)
    dots.set(xlabel=f"steps to {target:g} (hollow: at least)", xlim=(0, None))
    dots.set(yticks=range(len(looks)), yticklabels=[], ylim=(len(looks) - 0.6, -0.8))
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    handles, names = grid[0, 0].get_legend_handles_labels()
    ncols = math.ceil(len(names) / math.ceil(len(names) / 5))
    figure.legend(handles, names, loc="outside lower center", ncols=ncols, handlelength=4)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
