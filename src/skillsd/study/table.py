"""`skillsd table`: train what is missing, evaluate it, refuse what is not comparable, show the rest."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

from rich.console import Console

from skillsd.report import manifest
from skillsd.report.tables import table
from skillsd.report.writer import write_whole
from skillsd.study.plan import Study
from skillsd.study.results import check, left_out, summarise
from skillsd.study.runner import jobs_at_once, run_cells
from skillsd.study.show import curves, markdown, notes, tables
from skillsd.study.state import DONE, GO_ON, curve, evaluated, read_manifest, state, steps


def run_table(study: Study, console: Console, *, jobs: int | None = None) -> bool:
    """Do all of it; what comes of it lies in the study's folder as table.json, table.md and curves.png.

    Returns:
        Whether all cells are in the table; those that failed, or had to be left out, are not.

    Raises:
        UserError: if what is there may not stand side by side; nothing is trained then.
    """
    check(study)
    odd = left_out(study)
    states = ["left out" if cell.name in odd else state(study, cell) for cell in study.cells]
    console.print(
        f"{study.config.name}: {len(study.models)} base model(s) x {len(study.methods)} methods x {len(study.seeds)} "
        f"seed(s) = {len(states)} cells, {states.count(DONE)} of them done; {jobs or jobs_at_once(study.config)} at a "
        f"time. Everything goes into {study.out}/",
        highlight=False,
    )
    for name, reason in odd.items():
        console.print(f"leaving out {name}: {reason}", highlight=False, soft_wrap=True)
    failures = run_cells(study, console, jobs=jobs, leave_out=odd)
    check(study)
    summary = write(study, console)
    for failure in failures:
        console.print(f"\n{failure}", highlight=False, soft_wrap=True)
    if failures:
        console.print(f"\n{len(failures)} of {len(states)} cells failed; the same command tries them again")
    return not failures and not summary["left_out"]


def write(study: Study, console: Console) -> dict[str, Any]:
    """Write and print the table of what is there."""
    command = shlex.join(["skillsd", *sys.argv[1:]])
    summary = {
        "recipe": study.recipe,
        "overrides": list(study.overrides),
        "split": study.split,
        "tasks": study.limit or study.tasks,
        "fingerprint": study.panels[study.split] + (f":{study.limit} spread" if study.limit else ""),
        "samples": study.samples,
        "seeds": list(study.seeds),
        "models": {label: {"name": name, "weights": _weights(study, label)} for label, name in study.models.items()},
        **summarise(study),
        "command": command,
        "versions": manifest.versions(),
        "commit": manifest.commit(),
        "processor": manifest.processor(),
    }
    write_whole(study.out / "table.json", json.dumps(summary, indent=2))
    write_whole(study.out / "table.md", markdown(study, summary, command))
    curves(study, study.out / "curves.png")
    for shown in tables(study, summary):
        console.print()
        console.print(shown)
    for note in notes(summary):
        console.print(f"\n{note}", highlight=False, soft_wrap=True)
    console.print(f"\n{study.out}/: table.json, table.md, curves.png", highlight=False)
    return summary


def show_plan(study: Study, console: Console) -> None:
    """What is there and what would run; nothing is started."""
    check(study)
    odd = left_out(study)
    rows, commands = [], []
    for cell in study.cells:
        if cell.name in odd:
            rows.append([cell.name, "left out", "-"])
            continue
        now = state(study, cell)
        reached = curve(cell, "metrics.jsonl")
        far = f" from {reached[-1]['iteration']} of {cell.iterations[-1]}" if now == GO_ON and reached else ""
        rows.append([cell.name, now + far, ", ".join(map(str, cell.iterations)) or "-"])
        commands += [shlex.join(["skillsd", *command[3:]]) for command in steps(study, cell)]
    caption = f"{sum(row[1] == DONE for row in rows)} of {len(rows)} done"
    console.print(table(str(study.out), ["cell", "state", "iterations"], rows, caption, words=("state",)))
    for name, reason in odd.items():
        console.print(f"{name} is left out: {reason}", highlight=False, soft_wrap=True)
    for command in commands:
        console.print(command, highlight=False, soft_wrap=True)


def _weights(study: Study, label: str) -> str | None:
    """The fingerprint of a base model's weights, as its runs and evaluations say (`check` saw that they agree)."""
    for cell in study.cells:
        if cell.model != label:
            continue
        played = [record for pair in (evaluated(study, cell) or {}).values() for record in pair]
        for record in (read_manifest(cell), *played):
            if weights := record.get("model", {}).get("weights"):
                return str(weights)
    return None
