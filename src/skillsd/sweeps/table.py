"""`skillsd table`: train and evaluate the missing cells of a sweep, check that all are comparable, show a table."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

from rich.console import Console

from skillsd.files.write import write_whole
from skillsd.report import manifest
from skillsd.report.tables import table
from skillsd.runs.lifecycle import read_manifest
from skillsd.sweeps.findings import warnings
from skillsd.sweeps.plan import Sweep
from skillsd.sweeps.results import check, left_out, summarise
from skillsd.sweeps.runner import jobs_at_once, run_cells
from skillsd.sweeps.show import curves, markdown, notes, tables
from skillsd.sweeps.state import DONE, RESUME, curve, evaluated, state, steps


def run_table(sweep: Sweep, console: Console, *, jobs: int | None = None) -> bool:
    """Run a sweep, and write table.json, table.md and curves.png into its folder.

    Returns:
        Whether the table contains all cells, i.e. none failed or was left out.

    Raises:
        UserError: if existing results are not comparable. Nothing is trained then.
    """
    check(sweep)
    odd = left_out(sweep)
    states = ["left out" if cell.name in odd else state(sweep, cell) for cell in sweep.cells]
    console.print(
        f"{sweep.config.name}: {len(sweep.models)} base model(s) x {len(sweep.methods)} methods x {len(sweep.seeds)} "
        f"seed(s) = {len(states)} cells, {states.count(DONE)} of them done; {jobs or jobs_at_once(sweep.config)} at a "
        f"time, in {sweep.out}/",
        highlight=False,
    )
    for name, reason in odd.items():
        console.print(f"leaving out {name}: {reason}", highlight=False, soft_wrap=True)
    for warning in warnings(sweep):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    failures = run_cells(sweep, console, jobs=jobs, leave_out=odd)
    check(sweep)
    summary = write(sweep, console)
    for failure in failures:
        console.print(f"\n{failure}", highlight=False, soft_wrap=True)
    if failures:
        console.print(f"\n{len(failures)} of {len(states)} cells failed. The same command tries them again")
    return not failures and not summary["left_out"]


def write(sweep: Sweep, console: Console) -> dict[str, Any]:
    """Write and print the table of the existing results."""
    summary = save(sweep)
    for shown in tables(sweep, summary):
        console.print()
        console.print(shown)
    for note in notes(summary):
        console.print(f"\n{note}", highlight=False, soft_wrap=True)
    console.print(f"\n{sweep.out}/: table.json, table.md, curves.png", highlight=False)
    return summary


def save(sweep: Sweep) -> dict[str, Any]:
    """Write table.json, table.md and curves.png from the existing results; returns the content of the first."""
    command = shlex.join(["skillsd", *sys.argv[1:]])
    summary = {
        "recipe": sweep.recipe,
        "overrides": list(sweep.overrides),
        "split": sweep.split,
        "tasks": sweep.limit or sweep.tasks,
        "fingerprint": sweep.fingerprint,
        "samples": sweep.samples,
        "seeds": list(sweep.seeds),
        "models": {label: {"name": name, "weights": _weights(sweep, label)} for label, name in sweep.models.items()},
        **summarise(sweep),
        "command": command,
        "versions": manifest.versions(),
        "commit": manifest.commit(),
        "processor": manifest.processor(),
    }
    write_whole(sweep.out / "table.json", json.dumps(summary, indent=2))
    write_whole(sweep.out / "table.md", markdown(sweep, summary, command))
    curves(sweep, sweep.out / "curves.png")
    return summary


def show_plan(sweep: Sweep, console: Console) -> None:
    """Print the state of each cell and the commands that would be run. Nothing is started."""
    check(sweep)
    odd = left_out(sweep)
    rows, commands = [], []
    for cell in sweep.cells:
        if cell.name in odd:
            rows.append([cell.name, "left out", "-"])
            continue
        now = state(sweep, cell)
        reached = curve(cell, "metrics.jsonl")
        far = f" from {reached[-1]['iteration']} of {cell.iterations[-1]}" if now == RESUME and reached else ""
        rows.append([cell.name, now + far, ", ".join(map(str, cell.iterations)) or "-"])
        commands += [shlex.join(["skillsd", *command[3:]]) for command in steps(sweep, cell)]
    caption = f"{sum(row[1] == DONE for row in rows)} of {len(rows)} done"
    console.print(table(str(sweep.out), ["cell", "state", "iterations"], rows, caption, words=("state",)))
    for name, reason in odd.items():
        console.print(f"{name} is left out: {reason}", highlight=False, soft_wrap=True)
    for warning in warnings(sweep):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    for command in commands:
        console.print(command, highlight=False, soft_wrap=True)


def _weights(sweep: Sweep, label: str) -> str | None:
    """The fingerprint of a base model's weights, from its runs and evaluations (`check` ensures that they agree)."""
    for cell in sweep.cells:
        if cell.model != label:
            continue
        records = [record for pair in (evaluated(sweep, cell) or {}).values() for record in pair]
        for record in (read_manifest(cell.folder), *records):
            if weights := record.get("model", {}).get("weights"):
                return str(weights)
    return None
