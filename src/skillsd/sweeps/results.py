"""The results of a sweep: read from its files, checked for comparability, with means and intervals.

The unit of inference is what varies between repetitions:

- Several base models: the base model, averaged over its seeds (seeds do not show how much base models differ).
- One base model: the training seed.
- One run, or seeds with identical episodes: the tasks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from skillsd.envs.base import evenly_spaced
from skillsd.errors import UserError
from skillsd.evaluation.evaluate import mean_interval, student
from skillsd.report import manifest
from skillsd.report.writer import METRICS
from skillsd.runs.lifecycle import read_manifest
from skillsd.sweeps.findings import findings
from skillsd.sweeps.plan import Cell, Sweep, fewest_episodes
from skillsd.sweeps.state import curve, evaluated, state

Unit = Literal["models", "seeds", "tasks"]
Interval = tuple[float, float]
Tasks = tuple[float | None, ...]
"""A result per task, in the order of the split; None after an infrastructure failure."""

FIGURES = ("accuracy", "completion", "greedy_accuracy")


@dataclass(frozen=True)
class Measured:
    """The results of one cell at one budget.

    Attributes:
        accuracy, completion, greedy_accuracy: per task.
        episodes, seconds: training episodes and wall-clock time up to that budget.
    """

    model: str
    method: str
    seed: int
    accuracy: Tasks
    completion: Tasks
    greedy_accuracy: Tasks
    episodes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """A mean over the unit of inference, its 95 % interval if it has one, and the number of cells."""

    mean: float
    interval: Interval | None
    cells: int

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "interval": self.interval, "pairs": self.cells}


# -- statistics -----------------------------------------------------------------------------------------------------


def unit_of(models: int, seeds: int) -> Unit:
    """The unit of inference for these numbers of base models and seeds."""
    return "models" if models > 1 else "seeds" if seeds > 1 else "tasks"


def estimate(cells: Iterable[Measured], figure: str, unit: Unit) -> Estimate | None:
    """A method's mean `figure` with its interval; None without cells."""
    cells = list(cells)
    if cells and _is_one_result([_known(getattr(cell, figure)) for cell in cells], unit):
        values = _known(getattr(cells[0], figure))
        return Estimate(_mean(values), mean_interval(values), len(cells)) if values else None
    return mean_over({(c.model, c.seed): _mean(_known(getattr(c, figure))) for c in cells}, unit, (0.0, 1.0))


def difference(ours: Iterable[Measured], theirs: Iterable[Measured], figure: str, unit: Unit) -> Estimate | None:
    """`ours` - `theirs`, paired by base model and seed; None without a complete pair."""
    other = {(cell.model, cell.seed): cell for cell in theirs}
    pairs = [(cell, other[cell.model, cell.seed]) for cell in ours if (cell.model, cell.seed) in other]
    # Only tasks that both have: an infrastructure failure on one side is not a difference.
    values = [_task_differences(a, b, figure) for a, b in pairs]
    if values and _is_one_result(values, unit):
        found = _wide(student(values[0], (-1.0, 1.0)))
        return Estimate(_mean(values[0]), found, len(pairs)) if values[0] else None
    means = {(a.model, a.seed): _mean(value) for (a, _), value in zip(pairs, values, strict=True)}
    return mean_over(means, unit, (-1.0, 1.0))


def _is_one_result(values: Sequence[Sequence[float]], unit: Unit) -> bool:
    """Whether the cells (their results per task) amount to a single one: there is only one, or all are identical, as an
    untrained model's greedy episodes are for every seed."""
    if unit == "tasks":
        return len(values) == 1
    return unit == "seeds" and len(values) > 1 and all(value == values[0] for value in values)


def _wide(interval: Interval | None) -> Interval | None:
    """None for an interval of zero width: identical values do not show how much the value varies."""
    return interval if interval and interval[1] - interval[0] > 1e-9 else None


def mean_over(values: Mapping[tuple[str, int], float], unit: Unit, bounds: Interval) -> Estimate | None:
    """Mean over the unit: over all seeds, or over models, each averaged over its seeds first. None without a value.

    Args:
        values: (model, seed) -> value; nan is left out.
        bounds: of the interval.
    """
    known = {key: value for key, value in values.items() if not math.isnan(value)}
    if not known:
        return None
    points = list(known.values())
    if unit == "models":
        models = dict.fromkeys(model for model, _ in known)
        points = [_mean([value for (model, _), value in known.items() if model == name]) for name in models]
    return Estimate(_mean(points), _wide(student(points, bounds)), len(known))


def _task_differences(ours: Measured, theirs: Measured, figure: str) -> list[float]:
    pairs = zip(getattr(ours, figure), getattr(theirs, figure), strict=True)
    return [a - b for a, b in pairs if a is not None and b is not None]


def _known(values: Tasks) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


# -- reading --------------------------------------------------------------------------------------------------------


def measured(sweep: Sweep, budget: int, leave_out: Collection[str] = ()) -> dict[str, list[Measured]]:
    """Method -> its finished cells at a budget, possibly none.

    Args:
        leave_out: names of cells to skip.
    """
    place = sweep.budgets.index(budget)
    found: dict[str, list[Measured]] = {method: [] for method in sweep.methods}
    for cell in sweep.cells:
        if cell.name in leave_out or (figures := evaluated(sweep, cell)) is None:
            continue
        iteration = cell.iterations[place] if cell.trained else None
        sampled, greedy = figures[iteration]
        record = next((r for r in curve(cell, METRICS) if r["iteration"] == iteration), {})
        found[cell.method].append(
            Measured(
                model=cell.model,
                method=cell.method,
                seed=cell.seed,
                accuracy=tuple(evenly_spaced(sampled["successes"], sweep.limit)),
                completion=tuple(evenly_spaced(sampled["rewards"], sweep.limit)),
                greedy_accuracy=tuple(evenly_spaced(greedy["successes"], sweep.limit)),
                episodes=int(record.get("episodes", 0)),
                seconds=float(record.get("seconds", 0.0)),
            )
        )
    return found


def summarise(sweep: Sweep) -> dict[str, Any]:
    """The content of the table, JSON-serialisable."""
    unit = unit_of(len(sweep.models), len(sweep.seeds))
    odd = left_out(sweep)
    budgets = {}
    for budget in sweep.budgets:
        cells = measured(sweep, budget, odd)
        theirs = cells[sweep.against]
        budgets[str(budget)] = {
            method: _row(sweep, found, theirs if method != sweep.against else None, unit)
            for method, found in cells.items()
        }
    return {
        "unit": unit,
        "against": sweep.against,
        "budgets": budgets,
        "left_out": odd,
        "findings": findings(sweep, odd),
        "made_with": _made_with(sweep, odd),
    }


def _made_with(sweep: Sweep, leave_out: Collection[str]) -> dict[str, Any]:
    """The commits of the runs in the table, and the package versions of the runs and their evaluations."""
    figures = [(cell, evaluated(sweep, cell) or {}) for cell in sweep.cells if cell.name not in leave_out]
    manifests = [read_manifest(cell.folder) for cell, found in figures if cell.trained and found]
    records = [record for _, found in figures for pair in found.values() for record in pair]
    versions: dict[str, set[str]] = {}
    for made in (*manifests, *records):
        for package, version in made.get("versions", {}).items():
            versions.setdefault(package, set()).add(version or "none")
    return {
        "commits": sorted({manifest_.get("commit") or "unknown" for manifest_ in manifests}),
        "versions": {package: sorted(found) for package, found in sorted(versions.items())},
    }


def _row(sweep: Sweep, cells: Sequence[Measured], theirs: Sequence[Measured] | None, unit: Unit) -> dict[str, Any]:
    row: dict[str, Any] = _figures(cells, unit)
    row |= {
        "seeds": len({cell.seed for cell in cells}),
        "models": len({cell.model for cell in cells}),
        "cells": len(cells),
        "cells_asked": len(sweep.models) * len(sweep.seeds),
        "episodes": round(_mean([cell.episodes for cell in cells])) if cells else None,
        "seconds": _mean([cell.seconds for cell in cells]) if cells else None,
        "by_model": {},
    }
    if theirs is not None:
        row["difference"] = _differences(cells, theirs, unit)
    for model in sweep.models:
        own = [cell for cell in cells if cell.model == model]
        within: Unit = "seeds" if len(sweep.seeds) > 1 else "tasks"
        part = _figures(own, within)
        for figure in FIGURES:
            part[f"{figure}_by_seed"] = {
                str(cell.seed): _mean(_known(getattr(cell, figure))) for cell in own if _known(getattr(cell, figure))
            }
        part["seconds_by_seed"] = {str(cell.seed): cell.seconds for cell in own}
        if theirs is not None:
            part["difference"] = _differences(own, [cell for cell in theirs if cell.model == model], within)
        row["by_model"][model] = part
    return row


def _figures(cells: Sequence[Measured], unit: Unit) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for figure, interval in zip(FIGURES, ("interval", "completion_interval", "greedy_interval"), strict=True):
        value = estimate(cells, figure, unit)
        found |= {figure: value.mean if value else None, interval: value.interval if value else None}
    return found


def _differences(ours: Sequence[Measured], theirs: Sequence[Measured], unit: Unit) -> dict[str, Any]:
    made = {figure: difference(ours, theirs, figure, unit) for figure in FIGURES}
    return {figure: value.as_dict() if value else None for figure, value in made.items()}


# -- checks ---------------------------------------------------------------------------------------------------------


def left_out(sweep: Sweep) -> dict[str, str]:
    """Name -> reason, for the cells that can't be in the table. The others are unaffected."""
    reasons = {}
    for cell in sweep.cells:
        try:
            state(sweep, cell)
        except UserError as error:
            reasons[cell.name] = str(error)
        else:
            if reason := _wrong_episodes(sweep, cell):
                reasons[cell.name] = reason
    return reasons


def check(sweep: Sweep) -> None:
    """Check that the existing results are comparable: same tasks, each base model the same as now, different weights
    for different labels, same evaluation settings. Cells in `left_out` are ignored.

    Raises:
        UserError: with the cells and what differs, a line per problem; or if no usable run is left.
    """
    odd = left_out(sweep)
    trained = [cell.name for cell in sweep.cells if cell.trained]
    if trained and set(trained) <= odd.keys():
        raise UserError("no usable run for a table:\n  " + "\n  ".join(f"{name}: {odd[name]}" for name in trained))
    panels: dict[tuple[int, str], tuple[str, str]] = {
        (seed, split): ("the current environment", fingerprint)
        for seed, of_seed in sweep.panels.items()
        for split, fingerprint in of_seed.items()
    }
    bases: dict[tuple[str, str], tuple[str, str]] = {}
    for label, name in sweep.models.items():
        now = manifest.model(name)
        bases |= {(label, part): ("its folder now", found) for part in _PARTS if (found := now[part])}
    expected_settings: tuple[str, dict[str, Any]] | None = None
    problems: list[str] = []
    for cell in sweep.cells:
        if cell.name in odd:
            continue
        made = read_manifest(cell.folder) if cell.trained else {}
        for split, fingerprint in made.get("panels", {}).items():
            first, expected = panels.setdefault((cell.seed, split), (cell.name, fingerprint))
            if fingerprint != expected:
                problems.append(
                    f"the tasks of {split!r} differ between {cell.name} ({fingerprint}) and {first} ({expected})"
                )
        figures = evaluated(sweep, cell) or {}
        records = [record for pair in figures.values() for record in pair]
        for model in (made.get("model", {}), *(record.get("model", {}) for record in records)):
            for part, in_words in _PARTS.items():
                if not (found := model.get(part)):
                    continue
                first, expected = bases.setdefault((cell.model, part), (cell.name, found))
                if found != expected:
                    problems.append(
                        f"the {in_words} of the base model {cell.model!r} differ between {cell.name} ({found}) and "
                        f"{first} ({expected})"
                    )
        for pair in figures.values():
            settings = _settings(pair)
            expected_settings = expected_settings or (cell.name, settings)
            first, theirs = expected_settings
            if differing := [key for key in settings if settings[key] != theirs.get(key)]:
                both = "; ".join(f"{key} {settings[key]} and {theirs.get(key)}" for key in differing)
                problems.append(f"{cell.name} and {first} were evaluated with different settings: {both}")
    problems += _same_bases({label: found for (label, part), (_, found) in bases.items() if part == "weights"})
    if problems:
        raise UserError(
            "the results are not comparable:\n  "
            + "\n  ".join(dict.fromkeys(problems))
            + f"\nRemove the unwanted ones from {str(sweep.out)!r}, or give another folder with --out"
        )


_PARTS = {"weights": "weights", "files": "tokenizer or configuration files"}
"""What identifies a base model (`skillsd.report.manifest.model`), with words for messages."""


def _same_bases(known: Mapping[str, str]) -> list[str]:
    """Labels with the same weights, which would count as different base models in the intervals.

    Args:
        known: label -> fingerprint of the weights, as far as it is known.
    """
    labels: dict[str, list[str]] = {}
    for label, weights in known.items():
        labels.setdefault(weights, []).append(label)
    return [
        f"{' and '.join(map(repr, same))} are the same base model: equal weights ({weights})"
        for weights, same in labels.items()
        if len(same) > 1
    ]


def _settings(pair: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """The settings of an evaluation that the plan does not give."""
    sampled, greedy = pair
    return {"budget": sampled.get("budget"), "greedy budget": greedy.get("budget")}


def _wrong_episodes(sweep: Sweep, cell: Cell) -> str:
    """How the cell's episode counts differ from the budgets; empty if they don't."""
    at = {record["iteration"]: int(record["episodes"]) for record in curve(cell, METRICS)}
    wrong = []
    for budget, iteration in zip(sweep.budgets if cell.trained else (), cell.iterations, strict=True):
        used = at.get(iteration, budget)
        if used > budget or used < fewest_episodes(cell.config, iteration):
            wrong.append(f"{used} episodes up to iteration {iteration}, not {budget}")
    return f"it used {', and '.join(wrong)}" if wrong else ""
