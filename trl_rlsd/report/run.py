"""Runs drawn over each other on one HTML page: no network, and whatever the runs wrote is inert.

output_dirs -> Run (logs) -> plots (curves), a summary, settings, alarms, credit pictures -> page
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from plotly.offline import get_plotlyjs

from trl_rlsd import __version__
from trl_rlsd.files import write_whole
from trl_rlsd.report.curves import DASHES, MAX_POINTS, OTHERS, SYMBOLS, look, running_mean, sections, short
from trl_rlsd.report.logs import Run, load_runs, number
from trl_rlsd.report.page import digest
from trl_rlsd.run_record import METRICS_FILE
from trl_rlsd.texts import visible


MAX_PICTURE = 2_000_000  # bytes of a page of credit pictures that is embedded
_TOLD = ("format", "steps", "finished", "device", "processes")  # in the summary, so not among the settings


def run_report(output_dirs: Sequence[str | Path], html: str | Path, *, smooth: int | None = None) -> Path:
    """Draw runs over each other on one self-contained page, and return the page's path.

    Args:
        smooth: optimizer steps of the running mean; None: a twentieth of the longest run, at least 5.

    Raises: `ValueError` for no folder, a folder given twice, a folder without logs, and `smooth` below 1.
    """
    if smooth is not None and smooth < 1:
        raise ValueError(
            f"smooth={smooth} is out of range; it must be at least 1, the optimizer steps of the running mean"
        )
    runs = load_runs(output_dirs)
    smooth = smooth or max(5, round(max(run.last_step for run in runs) / 20))
    pictures = [(run.name, run.credit.name, text) for run in runs if run.credit and (text := _picture(run.credit))]
    template, plotly, script = _sources()
    # the frames' documents inherit this page's policy
    framed = [found for *_, text in pictures for found in re.findall(r"(?is)<script\b[^>]*>(.*?)</script", text)]
    page = template.render(
        version=__version__,
        runs=[(run, look(i)) for i, run in enumerate(runs)],
        folded=(OTHERS,),
        symbols=SYMBOLS,
        dashes=DASHES,
        short=short,
        notes=_notes(runs),
        summary=_with_values([_summary(run, smooth) for run in runs]),
        settings=_settings(runs),
        sections=sections(runs, smooth),
        alarms=[(run.name, alarm) for run in runs for alarm in run.alarms],
        pictures=pictures,
        plotly=plotly,
        script=script,
        digests=list(map(digest, (plotly, script, *framed))),
    )
    write_whole(Path(html), page)
    return Path(html)


@cache
def _sources() -> tuple[Template, str, str]:
    """The page's template, plotly.js, and the page's own script."""
    loader = PackageLoader("trl_rlsd.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    # JSON has no nan; one that comes this far shall not become a page that does not open
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    script = loader.get_source(environment, "run.js")[0]
    # a browser takes the digest of a script with its line breaks unified
    return environment.get_template("run.html"), get_plotlyjs().replace("\r\n", "\n"), script.replace("\r\n", "\n")


def _summary(run: Run, smooth: int) -> dict[str, str]:
    """Heading -> value, the same headings for all runs."""
    planned = run.setting("max_steps", -1)
    rewards = run.points("reward")
    # a mean over fewer steps than the others would win by luck
    means = [(step, mean) for step, mean in running_mean(rewards, smooth) if step >= rewards[0][0] + smooth - 1]
    best = max(means, key=lambda point: point[1]) if means else None
    finished = run.record.get("finished", any("train_runtime" in log for log in run.logs) or None)
    tokens = run.points("num_tokens")
    return {
        "Steps": f"{run.last_step:,}" + (f" of {planned:,}" if planned > 0 else ""),
        "Finished": {True: "yes", False: "no: still going, or ended early"}.get(finished, "not known"),
        "Reward, running mean at the end": short(running_mean(rewards, smooth)[-1][1]) if rewards else "–",
        "Best running mean": f"{short(best[1])} (step {best[0]:,})" if best else "–",
        "Evaluation, reward before and after": _before_after(run, "eval_reward"),
        "Evaluation, right before and after": _before_after(run, "eval_rlsd/right"),
        "Time": _duration(run),
        "Tokens": f"{tokens[-1][1]:,.0f}" if tokens else "–",
        "Device": visible(str(run.record.get("device", "–")))
        + (f" × {count}" if (count := run.record.get("processes") or 1) != 1 else ""),
    }


def _with_values(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Less the headings under which no run has anything to tell."""
    told = [heading for heading in rows[0] if any(row[heading] != "–" for row in rows)]
    return [{heading: row[heading] for heading in told} for row in rows]


def _before_after(run: Run, metric: str) -> str:
    """Of each dataset that was evaluated; one is not compared with another."""
    told = {name: _ends(own, metric) for name, own in run.evaluations.items() if own.points(metric)}
    return "; ".join(f"{name}: {text}" if name else text for name, text in told.items()) or "–"


def _ends(run: Run, metric: str) -> str:
    points, logs = run.points(metric), [log for log in run.logs if metric in log]
    ends = points[:1] if len(points) == 1 else [points[0], points[-1]]
    # a log of an older run does not say of how many
    count = number(logs[-1].get("eval_completions", run.record.get("eval_completions")))
    text = " → ".join(f"{short(value)} (step {step:,})" for step, value in ends)
    if not count:
        return f"{text}, of an unknown number of completions"
    # the others are logged as means of means
    uneven = metric != "eval_rlsd/right" and any(log.get("eval_even") is False for log in logs)
    how = ", as means of batches, the last of which was smaller" if uneven else ""
    return f"{text}, of {count:,.0f} completions each{how}"


def _duration(run: Run) -> str:
    runtimes, times = run.points("train_runtime"), run.points("time")
    if runtimes:
        seconds = runtimes[-1][1]
    elif len(times) > 1:
        seconds = times[-1][1] - times[0][1]
    else:
        return "–"
    hours, minutes = divmod(round(seconds / 60), 60)
    text = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return text if runtimes else f"{text}, from the first log to the last"


def _settings(runs: Sequence[Run]) -> dict[str, list[tuple[str, list[str]]]]:
    """`differ` and `same`: (setting, its value in each run)."""
    tables = [dict(_flat({key: value for key, value in run.record.items() if key not in _TOLD})) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = [(visible(name), [table.get(name, "–") for table in tables]) for name in names]
    return {
        "differ": [row for row in rows if len(set(row[1])) > 1],
        "same": [row for row in rows if len(set(row[1])) == 1],
    }


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and (value or not name):
        for key, own in value.items():
            yield from _flat(own, key if not name or name == "settings" else f"{name}.{key}")
    elif name == "rewards" and isinstance(value, list) and all(isinstance(own, Mapping) for own in value):
        yield name, visible(", ".join(f"{own.get('weight')} × {own.get('name')}" for own in value))
    else:
        yield name, visible(value if isinstance(value, str) else json.dumps(value))


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    for run in runs:
        if run.torn:
            lines = "a line that cannot be read was" if run.torn == 1 else f"{run.torn} lines that cannot be read were"
            notes.append(f"{run.name}: {lines} passed over in {run.source}; a run that goes on or was killed has one.")
        if run.source != METRICS_FILE:
            notes.append(f"{run.name}: no {METRICS_FILE}; drawn from {run.source}, which has no alarms.")
        if run.credit and not _picture(run.credit):
            notes.append(f"{run.name}: {run.credit.name} is too large to be shown here; open it in {run.name}.")
    if unknown := [run.name for run in runs if not run.record]:
        notes.append(f"No rlsd_run.json, so settings and device are not known: {', '.join(unknown)}.")
    if any(len(run.logs) > MAX_POINTS for run in runs):
        notes.append(
            f"Curves of more than {MAX_POINTS:,} points are thinned out: of neighbouring logs the lowest and the "
            "highest are drawn. Running means and tables are made of all."
        )
    return notes


def _picture(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size <= MAX_PICTURE else None
