"""Runs of a sweep in which nothing was learnt, or a part of the method did nothing: before the start and after it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from skillsd.envs import registry
from skillsd.report.writer import METRICS
from skillsd.sweeps.plan import Cell, Sweep
from skillsd.sweeps.state import curve, evaluated
from skillsd.training.health import Finding, health, never_revisited
from skillsd.types import TRAIN_SPLIT


def warnings(sweep: Sweep) -> list[str]:
    """What is known before the start: methods with skills whose runs are too short to use any."""
    environment = sweep.config.environment
    tasks = len(registry.load(environment.name, environment.options).tasks(TRAIN_SPLIT))
    found = {
        f"{cell.method}: {finding}": None
        for cell in sweep.cells
        if cell.trained and (finding := never_revisited(cell.config, cell.config.curriculum.tasks or tasks))
    }
    return list(found)


def findings(sweep: Sweep, leave_out: Collection[str] = ()) -> list[dict[str, Any]]:
    """What is wrong with the trained cells, by method and kind, JSON-serialisable: the findings of
    `skillsd.training.health`, then methods whose results equal another's to the digit.

    Each has ``method``, ``name``, ``cells`` (names of the runs), ``runs`` (number of the method's runs), ``text`` and
    ``cure`` (the first run's).

    Args:
        leave_out: names of cells to skip.
    """
    runs: dict[str, int] = {}
    found: dict[tuple[str, str], list[tuple[Cell, Finding]]] = {}
    for cell in sweep.cells:
        if cell.name in leave_out or not (records := curve(cell, METRICS)):
            continue
        runs[cell.method] = runs.get(cell.method, 0) + 1
        for finding in health(records, cell.config):
            found.setdefault((cell.method, finding.name), []).append((cell, finding))
    of_runs = [
        {
            "method": method,
            "name": name,
            "cells": [cell.name for cell, _ in those],
            "runs": runs[method],
            "text": those[0][1].text,
            "cure": those[0][1].cure,
        }
        for (method, name), those in found.items()
    ]
    return [*of_runs, *_equal_rows(sweep, leave_out, {method for method, _ in found})]


def _equal_rows(sweep: Sweep, leave_out: Collection[str], explained: Collection[str]) -> list[dict[str, Any]]:
    """Methods whose every evaluation, task by task, equals that of an earlier row of the table.

    Args:
        explained: methods with another finding.
    """
    results: dict[str, dict[tuple[str, int], tuple[Cell, list[Any]]]] = {}
    for cell in sweep.cells:
        if cell.name not in leave_out and (figures := evaluated(sweep, cell)):
            per_task = [[(r["successes"], r["rewards"]) for r in pair] for pair in figures.values()]
            # An untrained model is the same at every budget.
            at_budgets = per_task if cell.trained else per_task * len(sweep.budgets)
            results.setdefault(cell.method, {})[cell.model, cell.seed] = (cell, at_budgets)
    found: list[dict[str, Any]] = []
    for method, ours in results.items():
        for other, theirs in results.items():
            if other == method:
                break  # only earlier rows
            if ours.keys() <= theirs.keys() and all(ours[key][1] == theirs[key][1] for key in ours):
                found.append(
                    {
                        "method": method,
                        "name": "equal_rows",
                        "cells": [cell.name for cell, _ in ours.values()],
                        "runs": len(ours),
                        "text": f"every result equals that of {other}, to the digit",
                        "cure": "This follows from the warning above"
                        if method in explained
                        else "No setting in which they differ had an effect",
                    }
                )
                break
    return found


def in_words(finding: dict[str, Any]) -> str:
    """A finding as a note below a table."""
    count = len(finding["cells"])
    which = f" ({count} of {finding['runs']} runs; {finding['cells'][0]})" if finding["runs"] > 1 else ""
    return f"Warning: {finding['method']}{which}: {finding['text']}. {finding['cure']}"
