"""A sweep's table on the console, in Markdown, and its learning curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from skillsd.report.pictures import cost_curves
from skillsd.report.progress import duration
from skillsd.report.tables import percent, table
from skillsd.sweeps.findings import in_words
from skillsd.sweeps.plan import Sweep
from skillsd.sweeps.state import curve
from skillsd.sweeps.variants import BASE

Texts = tuple[str, list[str], list[list[str]], str]
"""Title, columns, rows, caption."""

_OVER = {
    "models": "Intervals: Student's t over {models} independently trained base models, each the mean of its seeds.",
    "seeds": "Intervals: Student's t over {seeds} training seeds on one base model (for the base: {seeds} sampling "
    "seeds); they do not cover other base models. Where all seeds gave identical results, as the base's greedy "
    "episodes do: over the {tasks} tasks.",
    "tasks": "Intervals over the {tasks} tasks: with one seed, they do not cover the variance between training runs.",
}


def texts(sweep: Sweep, summary: Mapping[str, Any]) -> list[Texts]:
    """The tables of a sweep. For each budget: results, differences, and differences on each base model if several."""
    tasks = sweep.limit or sweep.tasks
    panel = f"{tasks} {f'of the {sweep.tasks} ' if sweep.limit else ''}tasks of {sweep.split!r}"
    if sweep.limit:
        panel += ", evenly spaced"
    over = _OVER[summary["unit"]].format(models=len(sweep.models), seeds=len(sweep.seeds), tasks=tasks)
    made: list[Texts] = []
    for budget in sweep.budgets:
        rows = summary["budgets"][str(budget)]
        after = f"after {budget:,} episodes"
        names = {name: _marked(name, row, budget) for name, row in rows.items()}
        about = f"{over} {_FEWER}" if any(_fewer(row, budget) for row in rows.values()) else over
        made.append(
            (
                f"{sweep.config.name}, {after}: {panel}, plain prompt",
                ["method", "accuracy [95 %]", "completion [95 %]", "greedy [95 %]", "runs", "episodes", "training"],
                [_row(name, row, budget) for name, row in rows.items()],
                about,
            )
        )
        others = [name for name in rows if name != sweep.against]
        if not others or not rows[sweep.against]["cells"]:
            continue
        made.append(
            (
                f"Difference to {names[sweep.against]}, {after}, points",
                ["method", "accuracy [95 %]", "completion [95 %]", "greedy [95 %]", "pairs"],
                [[names[name], *_difference(rows[name]["difference"])] for name in others],
                f"Paired by base model and seed. {about}",
            )
        )
        if len(sweep.models) > 1:
            within = "seeds (the tasks, where all seeds gave identical results)" if len(sweep.seeds) > 1 else "tasks"
            made.append(
                (
                    f"Difference to {names[sweep.against]} on each base model, {after}, points",
                    ["method", "base model", "accuracy [95 %]", "completion [95 %]", "greedy [95 %]", "pairs"],
                    [
                        [names[name], model, *_difference(rows[name]["by_model"][model]["difference"])]
                        for name in others
                        for model in sweep.models
                    ],
                    f"Intervals over the {within} of one base model.{about.removeprefix(over)}",
                )
            )
    return made


def tables(sweep: Sweep, summary: Mapping[str, Any]) -> list[Table]:
    """The tables for the console."""
    return [table(*text, words=("base model",)) for text in texts(sweep, summary)]


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Caveats below the tables, a line each."""
    lines = [f"Left out: {name}: {reason}" for name, reason in summary["left_out"].items()]
    lines += [in_words(finding) for finding in summary["findings"]]
    made = {"commit": summary["made_with"]["commits"], **summary["made_with"]["versions"]}
    if mixed := [f"{what} {', '.join(found)}" for what, found in made.items() if len(found) > 1]:
        lines.append(f"Made with more than one version: {'; '.join(mixed)}")
    return lines


def markdown(sweep: Sweep, summary: Mapping[str, Any], command: str) -> str:
    """The tables and notes as Markdown."""
    parts = []
    for title, columns, rows, caption in texts(sweep, summary):
        lines = [f"**{title}**", "", *map(_line, (columns, ["---"] * len(columns), *rows)), "", caption]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *notes(summary), f"Made by `{command}`."]) + "\n"


def curves(sweep: Sweep, path: Path) -> None:
    """Plot the learning curves of the trained cells, against episodes and against wall-clock time."""
    runs: dict[str, Any] = {}
    for cell in sweep.cells:
        if cell.trained and (records := curve(cell)):
            runs.setdefault(cell.method, []).append(records)
    cost_curves(runs, path, title=sweep.config.name, split=sweep.config.evaluation.split)


_FEWER = 'A row with "N of M" episodes used fewer episodes than its budget.'


def _fewer(row: Mapping[str, Any], budget: int) -> str:
    """``1,152 of 1,536`` for a trained row with fewer episodes than the budget, else empty."""
    return f"{row['episodes']:,} of {budget:,}" if 0 < (row["episodes"] or 0) < budget else ""


def _marked(name: str, row: Mapping[str, Any], budget: int) -> str:
    return f"{name} ({fewer} episodes)" if (fewer := _fewer(row, budget)) else name


def _row(name: str, row: Mapping[str, Any], budget: int) -> list[str]:
    asked = row["cells_asked"]
    if not row["cells"]:
        return [name, *["-"] * 3, f"0 of {asked}", "-", "-"]
    pairs = (("accuracy", "interval"), ("completion", "completion_interval"), ("greedy_accuracy", "greedy_interval"))
    figures = ["-" if row[figure] is None else percent(row[figure], row[interval]) for figure, interval in pairs]
    cells = str(asked) if row["cells"] == asked else f"{row['cells']} of {asked}"
    episodes = _fewer(row, budget) or f"{row['episodes']:,}"
    return [name, *figures, cells, episodes, duration(row["seconds"]) if name != BASE else "-"]


def _difference(found: Mapping[str, Any]) -> list[str]:
    shown = [_points(found[figure]) for figure in ("accuracy", "completion", "greedy_accuracy")]
    pairs = found["accuracy"]["pairs"] if found["accuracy"] else 0
    return [*shown, str(pairs)]


def _points(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    text = f"{100 * value['mean']:+.1f}"
    return f"{text} [{', '.join(f'{100 * end:+.1f}' for end in value['interval'])}]" if value["interval"] else text


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
