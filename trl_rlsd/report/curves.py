"""The plots of a run report: which curves, over which axes, as plotly's figures.

    Run -> points of a curve -> running mean -> thinned out -> traces, the numbers in words

A run has a colour and a symbol, a curve within a plot a dash; evaluations are dotted with open symbols, a line for
each dataset.
"""

from __future__ import annotations

import html as markup
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from trl_rlsd.report.logs import Points, Run, number
from trl_rlsd.texts import visible


# Okabe-Ito less yellow and black, each of which is lost on one of the two backgrounds; 6 and 5 have no common divisor,
# so 30 runs differ in the pair
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "x": "✖"}
_EVALUATIONS = ("dot", "dashdot", "dash")  # of one dataset, and of further ones
DASHES = {"solid": "none", "dash": "7 3", "dot": "2 3", "dashdot": "7 3 2 3"}  # plotly's name -> SVG's dash array
OTHERS = "Everything else that was logged"
MAX_POINTS = 1000  # of a curve
_MANY = 100  # logs, of which the curves of one plot hide each other
Curve = Callable[[Run, str], Points]


def logged(*metrics: str) -> Curve:
    """A curve: a metric or a sum of some, of training or, with the prefix "eval_", of evaluation."""
    return lambda run, prefix: run.points(*(prefix + name for name in metrics))


def teacher_share(run: Run, prefix: str = "") -> Points:
    """The teacher's share of the step time, at the step of the log in which its completions were generated.

    TRL's `step_time` is the mean over optimizer steps; `rlsd/teacher_seconds` is the mean over generation batches, of
    which one is begun every steps_per_generation * num_iterations micro-batches. So seconds of the teacher are those
    times the batches begun since the last log, and are shared over all logs until the next batch is begun. With one
    batch an optimizer step, the default: teacher_seconds / step_time. Where the teacher was not needed it is 0.

    TRL 1.16: `step_time` holds generation and rewards, forward and backward; not the optimizer's own step.
    """
    if prefix or not run.points("rlsd/teacher_seconds"):
        return []
    accumulated = run.setting("gradient_accumulation_steps", 1)
    every = run.setting("steps_per_generation", accumulated) * run.setting("num_iterations", 1)
    windows: list[list[float]] = []  # first step, seconds of the teacher, seconds
    previous = 0
    for log in run.logs:
        step, step_time = log["step"], number(log.get("step_time"))
        if step_time is None or step <= previous:
            continue
        # whole numbers, rounded up: a quotient of large ones is no float
        begun = -(-step * accumulated // every) - -(-previous * accumulated // every)
        if begun or not windows:
            windows.append([step, 0.0, 0.0])
        windows[-1][1] += (number(log.get("rlsd/teacher_seconds")) or 0.0) * begun
        windows[-1][2] += step_time * (step - previous)
        previous = step
    if len(windows) > 1 and previous * accumulated % every:
        windows.pop()  # cut short: the cheap steps that use its completions are missing
    return [(int(step), teacher / seconds) for step, teacher, seconds in windows if seconds > 0]


@dataclass(frozen=True)
class Plot:
    """One pair of axes. `curves`: label -> curve; `band`: a metric to draw above and below the first; `exact`: without
    noise, so that a running mean would only blur it; `ticks`: their format."""

    title: str
    curves: Mapping[str, Curve]
    unit: str = ""
    note: str = ""
    band: str | None = None
    exact: bool = False
    ticks: str | None = None


def _plot(title: str, metrics: str | Mapping[str, str], unit: str = "", note: str = "", **options) -> Plot:
    names = {"": metrics} if isinstance(metrics, str) else metrics
    return Plot(title, {label: logged(*name.split(" + ")) for label, name in names.items()}, unit, note, **options)


_PERCENT = "~%"
_share = partial(_plot, ticks=_PERCENT, unit="share")

SECTIONS: dict[str, tuple[Plot, ...]] = {
    "Learning": (
        _plot(
            "Reward",
            "reward",
            band="reward_std",
            note="Band: one standard deviation of the rewards within a batch, up and down, averaged in the same way. "
            "It is their spread, not the uncertainty of the mean.",
        ),
        _share("Right completions", "rlsd/right", note="Total reward at or above contrast_reward_below."),
        _plot("Entropy", "entropy", "nats per token"),
        _share(
            "Where there is no credit to place",
            {
                "groups with equal rewards": "frac_reward_zero_std",
                "completions not scored by the teacher": "rlsd/skipped",
                "rows without context": "rlsd/no_context",
                "rows without a wrong reference": "rlsd/no_contrast",
            },
        ),
    ),
    "Completions": (
        _plot(
            "Completion length",
            {"mean": "completions/mean_length", "longest": "completions/max_length"}
            | {"shortest": "completions/min_length"},
            "tokens",
        ),
        _share("Cut off at max_completion_length", "completions/clipped_ratio"),
        _share(
            "Leaks",
            {"cite what only the teacher reads": "rlsd/leak_cites", "share its words": "rlsd/leak_overlap"},
            note="Share of the completions.",
        ),
        _plot("Tokens so far", "num_tokens", "tokens", "Prompts and completions, of all processes.", exact=True),
    ),
    "Credit": (
        _plot("Lambda", {"": "rlsd/lambda", "where A < 0": "rlsd/lambda_negative"}, "mixing weight", exact=True),
        _share(
            "Clipped token weights",
            {"together": "rlsd/clip_low + rlsd/clip_high", "from below": "rlsd/clip_low"}
            | {"from above": "rlsd/clip_high"},
        ),
        _share(
            "Clipped token weights by sign",
            {
                "A > 0, from below": "rlsd/clip_low_pos",
                "A > 0, from above": "rlsd/clip_high_pos",
                "A < 0, from below": "rlsd/clip_low_neg",
                "A < 0, from above": "rlsd/clip_high_neg",
            },
        ),
        _plot("Mean weight", {"A > 0": "rlsd/weight_mean_pos", "A < 0": "rlsd/weight_mean_neg"}, "factor"),
        _plot(
            "Largest factor of a gate",
            {"A > 0": "rlsd/weight_max_pos", "A < 0": "rlsd/weight_max_neg"},
            "factor",
            "Of a completion's tokens; 1 - lambda where the gate opens for none in particular.",
        ),
        _plot("Gain", "rlsd/gain_mean", "nats per token", "Teacher's log-prob minus the student's, mean over tokens."),
        _plot("Gain of a completion", {"A > 0": "rlsd/gain_sum_pos", "A < 0": "rlsd/gain_sum_neg"}, "nats"),
        _share(
            "Credit by quarter of the completion",
            {name: f"rlsd/credit_quarter_{i}" for i, name in enumerate(("first", "second", "third", "last"), 1)},
        ),
        _share(
            "On the final answer",
            {"credit": "rlsd/credit_on_answer", "credit that the teacher moved": "rlsd/moved_on_answer"}
            | {"tokens": "rlsd/tokens_on_answer"},
        ),
        _share("Right and wrong reference agree in sign", "rlsd/sign_agreement", note="Share of the tokens."),
    ),
    "Teacher": (
        _plot("KL of student and teacher", "rlsd/kl", "nats per token"),
        Plot(
            "Teacher's share of the step time",
            {"": teacher_share},
            "share",
            "Seconds of the teacher per generation batch (mean over processes) times the batches begun, by TRL's "
            "step_time of all optimizer steps that use them. step_time holds generation, rewards, forward and "
            "backward; not the optimizer's own step, evaluation or saving. Without rlsd_run.json one generation batch "
            "an optimizer step is assumed, TRL's default.",
            ticks=_PERCENT,
        ),
        _plot(
            "Seconds",
            {"optimizer step": "step_time", "teacher, per generation batch": "rlsd/teacher_seconds"},
            "seconds",
        ),
    ),
    "Optimisation": (
        _plot("Loss", "loss"),
        _plot("KL to the reference policy", "kl", "nats per token", "Penalised where beta > 0."),
        _share(
            "Clipped policy ratios",
            {"together": "clip_ratio/region_mean", "from below": "clip_ratio/low_mean"}
            | {"from above": "clip_ratio/high_mean"},
        ),
        _plot("Gradient norm", "grad_norm"),
        _plot("Learning rate", "learning_rate", exact=True, ticks="~g"),
    ),
}
# counted by the Trainer on the way, no quantity of the training
_NOT_PLOTTED = re.compile(r"step|time|epoch|total_flos|(train_)?(runtime|loss|(samples|steps)_per_second)|.*_time")
# in SECTIONS, or of no interest beside what is
_SHOWN = re.compile(
    r"reward(_std)?|rlsd/(?!no_span|privileged_tokens_cut|length_trend).*|frac_reward_zero_std|entropy|kl|loss|grad_norm|"
    r"learning_rate|num_tokens|completions/(clipped_ratio|(mean|min|max)_length)|clip_ratio/(region|low|high)_mean"
)


def running_mean(points: Points, steps: int) -> Points:
    """At each point the mean of the values of the last so many steps, its own among them: nothing of later ones."""
    means, first, total = [], 0, 0.0
    for i, (step, value) in enumerate(points):
        total += value
        while points[first][0] <= step - steps:
            total -= points[first][1]
            first += 1
        means.append((step, total / (i - first + 1)))
    return means


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """At most so many of the points: the lowest and the highest of each stretch of neighbours, so that no peak is
    lost, and the first and the last point."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2 - 1))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        block = range(start, min(start + size, len(points)))
        kept |= {min(block, key=lambda i: points[i][1]), max(block, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


@dataclass(frozen=True)
class Line:
    """How a curve is drawn. `faint`: each log, behind its running mean."""

    label: str
    dash: str
    width: float = 2.0
    evaluation: bool = False
    faint: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """A plot with its data. `key`: the lines of each run that are to be told apart; `rows`: the numbers in words."""

    plot: Plot
    figure: dict[str, Any]
    note: str
    key: list[Line]
    rows: list[dict[str, Any]]

    @property
    def label(self) -> str:
        ends = "; ".join(
            f"{row['label']} from {short(row['first'][1])} to {short(row['last'][1])}" for row in self.rows
        )
        return f"{self.plot.title} over optimizer steps. {ends}."


def sections(runs: Sequence[Run], smooth: int) -> dict[str, list[Drawn]]:
    """Section -> its plots that have data: `SECTIONS`, each reward function, and whatever else the runs log."""
    names = {name.removeprefix("eval_") for run in runs for name in run.curves}
    functions = {name for name in names if re.fullmatch(r"rewards/.*/mean", name, re.DOTALL)}
    rest = [name for name in names - functions if not (_SHOWN.fullmatch(name) or _NOT_PLOTTED.fullmatch(name))]
    single = [Plot(visible(name[8:-5]), {"": logged(name)}) for name in sorted(functions) if len(functions) > 1]
    others = [Plot(visible(name), {"": logged(name)}) for name in sorted(rest)]
    plots = {**SECTIONS, "Rewards by function": single, OTHERS: others}
    drawn = {name: [one for plot in own if (one := draw(plot, runs, smooth))] for name, own in plots.items()}
    return {name: own for name, own in drawn.items() if own}


def draw(plot: Plot, runs: Sequence[Run], smooth: int) -> Drawn | None:
    """A plot of all runs; None where none of them has data for it."""
    layers, rows = [], []
    key: dict[Any, Line] = {}
    for i, run in enumerate(runs):
        if plot.band:
            layers += _band(run, i, plot, smooth, 0.13 if len(runs) == 1 else 0.08)
        for line, points in _curves(plot, run):
            rows.append(_row(", ".join(filter(None, (run.name, line.label))), points))
            for part, drawn in _parts(plot, line, points, smooth):
                key.setdefault((part.label, part.faint > 0), part)
                layers.append(_trace(drawn, run, i, part))
    if not rows:
        return None
    # bands and single logs of every run lie behind the means of all
    traces = sorted(layers, key=lambda trace: trace.opacity)
    traces += [_alarm_marks(run, i) for i, run in enumerate(runs) if run.alarms]
    layout = _layout(plot, max(run.last_step for run in runs))
    values = {row[end][1] for row in rows for end in ("low", "high")}
    if len(values) == 1:  # plotly would show a constant 5e-4 between -1 and 1
        value = _rounded(values.pop())
        layout["yaxis"]["range"] = sorted((0.0, 1.5 * value or 1.0))
    # checked by plotly, and plain again
    figure = go.Figure(traces, layout).to_plotly_json()
    note = "" if plot.band and not any(run.points(plot.band) for run in runs) else plot.note
    return Drawn(plot, figure, note, _key(list(key.values()), smooth), rows)


def _key(lines: list[Line], smooth: int) -> list[Line]:
    faint = [Line("each log", "solid", 0.8), Line(f"running mean over {smooth} steps", "solid", 2.5)]
    named = [line for line in lines if line.label and not line.faint]
    return named + (faint if any(line.faint for line in lines) else [])


def _curves(plot: Plot, run: Run) -> Iterable[tuple[Line, Points]]:
    """Those that have any points."""
    for (label, curve), dash in zip(plot.curves.items(), DASHES, strict=False):
        if points := curve(run, ""):
            yield Line(label, dash), points
        for (name, own), dotted in zip(run.evaluations.items(), cycle(_EVALUATIONS)):
            if points := curve(own, "eval_"):
                told = " ".join(filter(None, ("evaluation", name)))
                yield Line(", ".join(filter(None, (label, told))), dotted, evaluation=True), points


def _parts(plot: Plot, line: Line, points: Points, smooth: int) -> list[tuple[Line, Points]]:
    """What is drawn of a curve: itself; or itself faintly, and its running mean. A few logs of several curves can be
    read as they are, and more lines would hide them."""
    if plot.exact or line.evaluation or (len(plot.curves) > 1 and len(points) <= _MANY):
        return [(line, points)]
    itself = replace(line, dash="solid", width=0.8, faint=0.65 if len(points) <= _MANY else 0.3)
    return [(itself, points), (replace(line, width=2.5), running_mean(points, smooth))]


def look(i: int) -> dict[str, str]:
    """Of the i-th run."""
    return {"color": COLOURS[i % len(COLOURS)], "symbol": list(SYMBOLS)[i % len(SYMBOLS)], "group": f"run{i}"}


def _trace(points: Points, run: Run, i: int, line: Line) -> go.Scatter:
    own, points = look(i), thinned(points)
    marker = dict(
        color=own["color"], symbol=own["symbol"] + "-open" * line.evaluation, size=9 if line.evaluation else 7
    )
    name = ", ".join(filter(None, (run.name, line.label, "each log" if line.faint else "")))
    return go.Scatter(
        x=[step for step, _ in points],
        y=[_rounded(value) for _, value in points],
        name=markup.escape(name, quote=False),  # plotly reads some HTML in it
        legendgroup=own["group"],
        mode="lines" if line.faint and len(points) > 1 else "lines+markers",
        line=dict(color=own["color"], dash=line.dash, width=line.width),
        marker=marker if line.evaluation else marker | dict(maxdisplayed=8),
        opacity=line.faint or 1.0,
        hovertemplate="%{y:.4~g}",
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _band(run: Run, i: int, plot: Plot, smooth: int, opacity: float) -> list[go.Scatter]:
    """The running mean of a metric above and below the running mean of the plot's curve, as one outline."""
    curve = next(iter(plot.curves.values()))
    widths = dict(running_mean(run.points(plot.band), smooth))
    middle = [(step, value) for step, value in running_mean(curve(run, ""), smooth) if step in widths]
    if len(middle) < 2:
        return []
    middle = middle[:: math.ceil(len(middle) / (MAX_POINTS // 2))]
    edges = [(step, value + widths[step]) for step, value in middle]
    edges += [(step, value - widths[step]) for step, value in reversed(middle)]
    red, green, blue = bytes.fromhex(look(i)["color"][1:])
    outline = go.Scatter(
        x=[step for step, _ in edges],
        y=[_rounded(value) for _, value in edges],
        legendgroup=look(i)["group"],
        name="band",
        mode="none",
        fill="toself",
        fillcolor=f"rgb({red},{green},{blue})",
        opacity=opacity,
        hoverinfo="skip",
    )
    return [outline]


def _alarm_marks(run: Run, i: int) -> go.Scatter:
    return go.Scatter(
        x=[alarm["step"] for alarm in run.alarms],
        y=[0.03] * len(run.alarms),
        yaxis="y2",
        legendgroup=look(i)["group"],
        name=markup.escape(f"{run.name}, alarm", quote=False),
        text=[markup.escape(visible(str(alarm["alarm"])), quote=False) for alarm in run.alarms],
        hovertemplate="%{text}",
        mode="markers",
        marker=dict(symbol="star", size=11, color=look(i)["color"], line=dict(width=1)),
    )


def _layout(plot: Plot, end: int) -> dict[str, Any]:
    """Colours of paper, ink and grid are set in the browser, by its colour scheme."""
    return dict(
        template="none",
        showlegend=False,
        height=290,
        margin=dict(l=58, r=12, t=8, b=40),
        hovermode="x unified",
        hoverdistance=-1,  # however far the next point
        hoverlabel=dict(namelength=40),
        xaxis=dict(title=dict(text="optimizer step", standoff=6), range=[-0.02 * end, 1.03 * end], zeroline=False),
        yaxis=dict(
            title=dict(text=markup.escape(plot.unit), standoff=4),
            zeroline=False,
            rangemode="tozero" if plot.ticks == _PERCENT else "normal",
            tickformat=plot.ticks,
        ),
        yaxis2=dict(overlaying="y", range=[0, 1], visible=False, fixedrange=True),
    )


def short(value: float) -> str:
    """Four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _row(label: str, points: Points) -> dict[str, Any]:
    """The numbers of a curve, of all of its points."""
    low, high = (pick(points, key=lambda point: point[1]) for pick in (min, max))
    return {"label": label, "points": len(points), "first": points[0], "low": low, "high": high, "last": points[-1]}
