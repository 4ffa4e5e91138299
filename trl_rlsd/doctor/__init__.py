"""`trl-rlsd doctor`: is this machine ready, is this recipe right, does it fit. No weights are loaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trl_rlsd.doctor.finding import ERROR, WARNING, Finding
from trl_rlsd.doctor.machine import examine_machine
from trl_rlsd.doctor.recipe import Examined, examine_recipe
from trl_rlsd.texts import visible


HELP = """\
usage: trl-rlsd doctor [--json] [--config FILE] [fields as for `trl-rlsd train`]

Versions, devices and what is installed; with a config or fields also the recipe's own checks, the first prompts of
student and teacher, and an estimate of the memory it takes. Exit status 1 if a line says ERROR.
"""
ACCURACY = (
    "An estimate: on a CPU in float32 within 25 % of 14 measured peaks (tests/benchmarks/step_cost.py), rather "
    "too high than too low; not measured on a GPU. Images and stragglers are not in it."
)
_STYLES = {ERROR: "bold red", WARNING: "yellow"}


def doctor(argv: Sequence[str] | None = None) -> int:
    """Examine the machine and a recipe, and print what is found; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return 0
    as_json = "--json" in argv
    argv = [text for text in argv if text != "--json"]
    sys.path.insert(0, os.getcwd())  # dotted paths may name modules beside the config
    with Console(stderr=True).status("Examining ..."):
        found = examine_machine()
        examined = examine_recipe(argv) if argv else Examined()
    findings = [*found, *examined.findings]
    if as_json:
        lines = [asdict(finding) for finding in findings]
        print(json.dumps({"findings": lines, "prompts": examined.prompts, "memory": examined.memory}, indent=2))
    else:
        _print(found, examined)
    return int(any(finding.level == ERROR for finding in findings))


def _print(found: list[Finding], examined: Examined) -> None:
    console = Console()
    console.print(_lines("Machine", found))
    if examined.findings:
        console.print(_lines("Recipe", examined.findings))
    if examined.prompts:
        console.print(Text(visible(examined.prompts)))
    if examined.memory:
        console.print(_memory(examined.memory), _devices(examined.memory))
        console.print(ACCURACY)


def _lines(title: str, findings: list[Finding]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1))
    for finding in findings:
        text = Text(visible(finding.text))
        table.add_row(Text(finding.level, style=_STYLES.get(finding.level, "green")), escape(finding.subject), text)
    return table


def _memory(memory: dict) -> Table:
    table = Table(title="Memory of a process, GB", title_justify="left")
    table.add_column("")
    table.add_column("part")
    table.add_column("GB", justify="right")
    for name, parts in {"all the time": memory["resident"], **memory["phases"]}.items():
        for part, size in parts.items():
            table.add_row(name, part, f"{size / 1e9:.2f}")
            name = ""
        table.add_section()
    table.add_row("peak", f"all the time, and the {memory['phase']}", f"{memory['peak'] / 1e9:.2f}")
    return table


def _devices(memory: dict) -> Table:
    table = Table("device", "has, GB", "", title="Does it fit?", title_justify="left")
    for row in memory["devices"]:
        table.add_row(escape(row["device"]), f"{row['bytes'] / 1e9:.1f}", row["verdict"])
    return table
