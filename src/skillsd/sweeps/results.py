"""What came of a sweep: figures read off its files, refused where they are not comparable, and how sure one can be.

What varies from one repetition to the next is the unit of inference. Several base models: the base, each averaged over
its seeds, as seeds on one base say nothing about the next base. One base: the training seed. One run, or seeds that
all gave one and the same play: the panel's tasks.
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
from skillsd.sweeps.plan import Cell, Sweep, plays_probes
from skillsd.sweeps.state import curve, evaluated, read_manifest, state

Unit = Literal["models", "seeds", "tasks"]
Interval = tuple[float, float]
Tasks = tuple[float | None, ...]
"""A figure of each task of the panel, in its order; None where the infrastructure broke it."""

FIGURES = ("accuracy", "completion", "greedy_accuracy")


@dataclass(frozen=True)
class Measured:
    """One cell at one budget.

    Attributes:
        accuracy, completion, greedy_accuracy: of each task.
        seconds: wall-clock of the training up to there.
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
    """A mean over the sweep's unit of inference, its 95 % interval if there is one, and of how many cells."""

    mean: float
    interval: Interval | None
    cells: int

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "interval": self.interval, "pairs": self.cells}


# -- statistics -----------------------------------------------------------------------------------------------------


def unit_of(models: int, seeds: int) -> Unit:
    """What the intervals of a sweep with so many of each are over."""
    return "models" if models > 1 else "seeds" if seeds > 1 else "tasks"


def estimate(cells: Iterable[Measured], figure: str, unit: Unit) -> Estimate | None:
    """A method's figure; None without a cell."""
    cells = list(cells)
    if cells and _is_one_play([_known(getattr(cell, figure)) for cell in cells], unit):
        values = _known(getattr(cells[0], figure))
        return Estimate(_mean(values), mean_interval(values), len(cells)) if values else None
    return _over({(c.model, c.seed): _mean(_known(getattr(c, figure))) for c in cells}, unit, (0.0, 1.0))


def difference(ours: Iterable[Measured], theirs: Iterable[Measured], figure: str, unit: Unit) -> Estimate | None:
    """`ours` - `theirs`, paired by base model and seed; None where no pair is whole."""
    other = {(cell.model, cell.seed): cell for cell in theirs}
    pairs = [(cell, other[cell.model, cell.seed]) for cell in ours if (cell.model, cell.seed) in other]
    # Only tasks that both have: a task that the infrastructure broke for one of them is no difference.
    values = [_task_differences(a, b, figure) for a, b in pairs]
    if values and _is_one_play(values, unit):
        found = _wide(student(values[0], (-1.0, 1.0)))
        return Estimate(_mean(values[0]), found, len(pairs)) if values[0] else None
    means = {(a.model, a.seed): _mean(value) for (a, _), value in zip(pairs, values, strict=True)}
    return _over(means, unit, (-1.0, 1.0))


def _is_one_play(values: Sequence[Sequence[float]], unit: Unit) -> bool:
    """Whether cells, of which these are the tasks' figures, say no more than one of them does: there is but one, or
    all are the same, as an untrained model's greedy play is on every seed."""
    if unit == "tasks":
        return len(values) == 1
    return unit == "seeds" and len(values) > 1 and all(value == values[0] for value in values)


def _wide(interval: Interval | None) -> Interval | None:
    """None for an interval without any width: what did not vary here does not tell how much it varies."""
    return interval if interval and interval[1] - interval[0] > 1e-9 else None


def _over(values: Mapping[tuple[str, int], float], unit: Unit, bounds: Interval) -> Estimate | None:
    """Mean over the unit: seeds of all models alike, or models, each averaged over its seeds first."""
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
    """method -> its finished cells at a budget; methods without any have an empty list.

    Args:
        leave_out: names of cells.
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
    """Everything that the table says, as JSON has it: budget -> method -> figures."""
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
        "made_with": _made_with(sweep, odd),
    }


def _made_with(sweep: Sweep, leave_out: Collection[str]) -> dict[str, Any]:
    """Commits, and versions of each package, of the runs in the table."""
    used = [cell for cell in sweep.cells if cell.trained and cell.name not in leave_out and evaluated(sweep, cell)]
    manifests = [read_manifest(cell) for cell in used]
    versions: dict[str, set[str]] = {}
    for said in manifests:
        for package, version in said.get("versions", {}).items():
            versions.setdefault(package, set()).add(version or "none")
    return {
        "commits": sorted({said.get("commit") or "unknown" for said in manifests}),
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


# -- refusals -------------------------------------------------------------------------------------------------------


def left_out(sweep: Sweep) -> dict[str, str]:
    """The cells that can't be in the table, each with the reason: the others can do without them."""
    reasons = {}
    for cell in sweep.cells:
        try:
            state(sweep, cell)
        except UserError as error:
            reasons[cell.name] = str(error)
        else:
            if told := _episodes(sweep, cell):
                reasons[cell.name] = told
    return reasons


def check(sweep: Sweep) -> None:
    """Whether what is there may stand side by side: same tasks, same weights of a base, another base under each label,
    same way of playing. What `left_out` names does not matter here.

    Raises:
        UserError: with the cells and what differs, a line for each reason; or if no run at all is left.
    """
    odd = left_out(sweep)
    trained = [cell.name for cell in sweep.cells if cell.trained]
    if trained and set(trained) <= odd.keys():
        raise UserError("there is no run for a table:\n  " + "\n  ".join(f"{name}: {odd[name]}" for name in trained))
    panels: dict[str, tuple[str, str]] = {
        split: ("the environment as it is now", fingerprint) for split, fingerprint in sweep.panels.items()
    }
    weights: dict[str, tuple[str, str]] = {}
    playing: tuple[str, dict[str, Any]] | None = None
    problems: list[str] = []
    for cell in sweep.cells:
        if cell.name in odd:
            continue
        said = read_manifest(cell) if cell.trained else {}
        for split, fingerprint in said.get("panels", {}).items():
            first, expected = panels.setdefault(split, (cell.name, fingerprint))
            if fingerprint != expected:
                problems.append(
                    f"the tasks of {split!r} are others in {cell.name} ({fingerprint}) than in {first} ({expected})"
                )
        figures = evaluated(sweep, cell) or {}
        records = [record for pair in figures.values() for record in pair]
        for model in (said.get("model", {}), *(record.get("model", {}) for record in records)):
            if not (found := model.get("weights")):
                continue
            first, expected = weights.setdefault(cell.model, (cell.name, found))
            if found != expected:
                problems.append(
                    f"the base model {cell.model!r} has other weights in {cell.name} ({found}) than in {first} "
                    f"({expected})"
                )
        for pair in figures.values():
            way = _way(pair)
            playing = playing or (cell.name, way)
            if differing := [key for key in way if way[key] != playing[1].get(key)]:
                told = "; ".join(f"{key} {way[key]} there, {playing[1].get(key)} here" for key in differing)
                problems.append(f"{cell.name} was evaluated otherwise than {playing[0]}: {told}")
    problems += _same_bases(sweep, {label: found for label, (_, found) in weights.items()})
    if problems:
        raise UserError(
            "not comparable, so there is no table:\n  "
            + "\n  ".join(dict.fromkeys(problems))
            + f"\nRemove what is not wanted from {str(sweep.out)!r}, or give another folder with --out"
        )


def _same_bases(sweep: Sweep, known: Mapping[str, str]) -> list[str]:
    """Two labels of one base would count as two bases, and their intervals would be over models that are one.

    Args:
        known: label -> fingerprint of the weights, of those that a run or an evaluation has told.
    """
    if len(sweep.models) < 2:
        return []
    labels: dict[str, list[str]] = {}
    for label, name in sweep.models.items():
        if weights := known.get(label) or manifest.weights_fingerprint(name):
            labels.setdefault(weights, []).append(label)
    return [
        f"{' and '.join(map(repr, same))} are one base model: their weights are the same ({weights})"
        for weights, same in labels.items()
        if len(same) > 1
    ]


def _way(pair: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """How an evaluation was played."""
    sampled, greedy = pair
    return {"temperature": sampled["temperature"], "samples": sampled["samples"], "budget": sampled.get("budget"),
            "greedy budget": greedy.get("budget")}  # fmt: skip


def _episodes(sweep: Sweep, cell: Cell) -> str:
    """How the cell's episodes are others than the budgets, if they are."""
    at = {record["iteration"]: int(record["episodes"]) for record in curve(cell, METRICS)}
    told = []
    for budget, iteration in zip(sweep.budgets if cell.trained else (), cell.iterations, strict=True):
        played = at.get(iteration, budget)
        if played > budget or (played < budget and not plays_probes(cell.config)):
            told.append(f"{played} episodes up to iteration {iteration}, not {budget}")
    return f"it played {', and '.join(told)}" if told else ""
