"""The state of each cell of a sweep, derived from files alone, so that a sweep can be resumed at any point."""

from __future__ import annotations

import sys
from typing import Any

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.errors import UserError
from skillsd.report.writer import EVALUATIONS, METRICS, read
from skillsd.runs.folder import CONFIG, never_began
from skillsd.runs.lifecycle import check_settings, check_texts
from skillsd.runs.subjects import local_settings, read_records, started
from skillsd.sweeps.plan import Cell, Sweep, scheduled_on_length
from skillsd.training import checkpoint

DONE, EVALUATE, RESUME, MISSING = "done", "to evaluate", "to resume", "missing"

Evaluations = dict[int | None, tuple[dict[str, Any], dict[str, Any]]]
"""Iteration (None: untrained) -> its sampled and its greedy evaluation record."""


def state(sweep: Sweep, cell: Cell) -> str:
    """One of `DONE`, `EVALUATE`, `RESUME`, `MISSING`.

    Raises:
        UserError: if the cell's folder contains a different run than the sweep's, or a checkpoint of a budget is gone.
    """
    if cell.trained:
        if not (cell.folder / CONFIG).is_file() or never_began(cell.folder):
            return MISSING
        check_settings(cell.config, cell.folder)
        check_texts(cell.config, cell.folder)
        _check_length(cell)
    missing = _not_evaluated(sweep, cell)
    if not missing:
        return DONE
    if not cell.trained:
        return MISSING
    there = checkpoint.iterations(cell.folder)
    if lost := [i for i in missing if i is not None and there and i <= there[-1] and i not in there]:
        raise UserError(
            f"{str(cell.folder)!r} has no checkpoint of iteration {', '.join(map(str, lost))}, as it was trained for "
            "other budgets: remove that folder to train again, or give another one with --out"
        )
    return EVALUATE if there and there[-1] >= cell.iterations[-1] else RESUME


def steps(sweep: Sweep, cell: Cell) -> list[list[str]]:
    """The remaining commands for the cell, in order."""
    now = state(sweep, cell)
    if now == DONE:
        return []
    python = [sys.executable, "-m", "skillsd"]
    file = str(cell.evaluation(sweep.split))
    how = ["--split", sweep.split, "--samples", str(sweep.samples), "--json", file, "--append"]
    if not cell.trained:
        settings = list(cell.overrides)
        return [[*python, "eval", "--model", sweep.models[cell.model], *settings, "--recipe", sweep.recipe, *how]]
    train = [*python, "train", sweep.recipe, *cell.overrides, "--out", str(cell.folder), "--resume"]
    points = [word for iteration in _not_evaluated(sweep, cell) for word in ("--at", str(iteration))]
    evaluate = [*python, "eval", str(cell.folder), *how, *points]
    return [evaluate] if now == EVALUATE else [train, evaluate]


def evaluated(sweep: Sweep, cell: Cell) -> Evaluations | None:
    """The cell's evaluations at every budget; None unless all are there."""
    found = _evaluations(sweep, cell)
    return found if len(found) == len(_points(cell)) else None


def _points(cell: Cell) -> tuple[int | None, ...]:
    return cell.iterations or (None,)


def _not_evaluated(sweep: Sweep, cell: Cell) -> list[int | None]:
    found = _evaluations(sweep, cell)
    return [iteration for iteration in _points(cell) if iteration not in found]


def _evaluations(sweep: Sweep, cell: Cell) -> Evaluations:
    """The existing evaluations of this run, with the sweep's split, tasks and number of samples, and the settings that
    an evaluation would have now."""
    records = read_records(cell.evaluation(sweep.split))
    settings = local_settings(cell.config)
    trained = {record["iteration"] for record in curve(cell, METRICS)}
    begun = started(cell.folder) if cell.trained else None
    found: Evaluations = {}
    for iteration in _points(cell):
        fitting = [
            record
            for record in records
            if record.get("iteration") == iteration
            and (not cell.trained or iteration in trained)
            and record.get("run") == begun
            and (cell.trained or record.get("model", {}).get("name") == sweep.models[cell.model])
            and record.get("split") == sweep.split
            and record.get("fingerprint") == sweep.panels[cell.seed][sweep.split]
            and len(record.get("successes", ())) == sweep.tasks
            and record.get("settings") == settings
            and record.get("seed") == cell.seed
        ]
        temperature = cell.config.rollout.temperature
        sampled = [r for r in fitting if r["temperature"] == temperature and r["samples"] == sweep.samples]
        greedy = [r for r in fitting if r["temperature"] == 0]
        if sampled and greedy:
            found[iteration] = (sampled[-1], greedy[-1])
    return found


def curve(cell: Cell, file: str = EVALUATIONS) -> list[dict[str, Any]]:
    """The records of the cell's run, up to its last budget."""
    records = read(cell.folder / file) if cell.trained else []
    return [record for record in records if record["iteration"] <= cell.iterations[-1]]


def _check_length(cell: Cell) -> None:
    """With a setting that depends on the run's length, a longer run differs from its first iteration on."""
    reason = scheduled_on_length(cell.config)
    if reason is None:
        return
    length = configs.load(RunConfig, str(cell.folder / CONFIG)).training.iterations
    if length != cell.config.training.iterations:
        raise UserError(
            f"{str(cell.folder)!r} contains a run of {length} iterations, and {reason}, which depends on the run's "
            f"length: it can't be extended to {cell.config.training.iterations}. Give another folder with --out"
        )
