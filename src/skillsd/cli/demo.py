"""`skillsd demo`: GRPO and Skill-SD on the same budget of episodes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from skillsd.config import RunConfig, load
from skillsd.envs.base import TaskSet
from skillsd.errors import UserError
from skillsd.files.write import write_whole
from skillsd.report.pictures import learning_curves
from skillsd.report.progress import duration
from skillsd.report.tables import percent, table
from skillsd.runs.build import BANK, load_task_set
from skillsd.skills.bank import Bank, StoredSkill
from skillsd.sweeps.findings import findings, in_words
from skillsd.sweeps.plan import Sweep, plan
from skillsd.sweeps.results import check, left_out, summarise
from skillsd.sweeps.runner import jobs_at_once, run_cells
from skillsd.sweeps.state import curve
from skillsd.sweeps.table import save
from skillsd.sweeps.variants import BASE
from skillsd.types import TRAIN_SPLIT

RECIPE = "sokoban-nano"
METHODS = ("grpo", "skill-sd")

CURVES = ("evaluation.split=test", "evaluation.limit=256")
"""The learning curves are of the split that is tabulated. They select nothing: every run is evaluated at its end."""


def run_demo(folder: Path, seeds: Sequence[int], overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Train each method on each seed, evaluate the runs and the base model on the test split, write ``summary.json``.

    Raises:
        UserError: if a run fails, with the last lines of its log.
    """
    begin = time.perf_counter()
    settings = (*CURVES, *overrides)
    split = load(RunConfig, RECIPE, settings).evaluation.split
    sweep = plan(RECIPE, settings, folder, methods=METHODS, seeds=seeds, split=split)
    console.print(
        f"Training {' and '.join(METHODS)} on {len(seeds)} seed{'s' * (len(seeds) > 1)}, {sweep.budgets[0]} episodes "
        f"each, {min(jobs_at_once(sweep.config), len(sweep.cells))} at a time, in {folder}/"
    )
    check(sweep)
    _all_usable(sweep)
    if failures := run_cells(sweep, console):
        raise UserError(str(failures[0]))
    check(sweep)
    _all_usable(sweep)
    summary = _summarise(sweep)
    write_whole(folder / "summary.json", json.dumps(summary, indent=2))
    save(sweep)
    picture = folder / "learning-curves.png"
    curves = {method: [curve(cell) for cell in sweep.cells if cell.method == method] for method in METHODS}
    learning_curves(curves, picture, title="Sokoban, tiny agent", split=_panel(sweep), base=summary[BASE]["accuracy"])
    _show(summary, console)
    skill_run = next(cell.folder for cell in sweep.cells if cell.method == METHODS[1])
    _show_skills(skill_run, load_task_set(sweep.config), console)
    for finding in findings(sweep):
        console.print(in_words(finding), highlight=False, soft_wrap=True)
    console.print(f"\nLearning curves: {picture}")
    console.print(f"Done in {duration(time.perf_counter() - begin)}: {folder}/summary.json")
    return summary


def _panel(sweep: Sweep) -> str:
    """The tasks of the learning curves, in words."""
    limit = sweep.config.evaluation.limit
    return f"{sweep.split}, {limit} of {sweep.tasks}" if limit and limit < sweep.tasks else sweep.split


def _all_usable(sweep: Sweep) -> None:
    for name, reason in left_out(sweep).items():
        raise UserError(f"{name}: {reason}")


def _summarise(sweep: Sweep) -> dict[str, Any]:
    [budget] = sweep.budgets
    [model] = sweep.models
    summary: dict[str, Any] = {
        "recipe": RECIPE,
        "split": sweep.split,
        "tasks": sweep.tasks,
        "fingerprint": sweep.fingerprint,
        "seeds": list(sweep.seeds),
    }
    kept = ("accuracy", "completion", "interval", "completion_interval", "greedy_accuracy", "episodes", "seconds")
    for name, row in summarise(sweep)["budgets"][str(budget)].items():
        by_seed: Mapping[str, Any] = row["by_model"][model]
        summary[name] = {key: row[key] for key in kept} | {
            key: list(by_seed[key].values()) for key in ("accuracy_by_seed", "greedy_accuracy_by_seed")
        }
    return summary


def _show(summary: dict[str, Any], console: Console) -> None:
    rows = []
    for name in (BASE, *METHODS):
        row = summary[name]
        rows.append(
            [
                name,
                percent(row["accuracy"], row["interval"]),
                percent(row["completion"], row["completion_interval"]),
                percent(row["greedy_accuracy"]),
                f"{row['episodes']:,}",
                duration(row["seconds"]) if row["episodes"] else "-",
            ]
        )
    caption = "Intervals over tasks. One seed shows that both learn, not which one is better."
    if (seeds := len(summary["seeds"])) > 1:
        caption = f"Intervals over {seeds} training seeds (for the base: {seeds} sampling seeds)."
    console.print()
    console.print(
        table(
            f"Held-out Sokoban levels ({summary['tasks']}, split {summary['split']}), sampled, plain prompt",
            ["method", "accuracy [95 %]", "completion [95 %]", "greedy", "episodes", "training"],
            rows,
            caption=caption,
        )
    )


def _show_skills(run: Path, task_set: TaskSet, console: Console, count: int = 3) -> None:
    """Print the most successful skills of different tasks, in words."""
    with Bank(run / BANK) as bank:
        stored = bank.skills()
    tasks = {task.id: task for task in task_set.tasks(TRAIN_SPLIT)}
    by_task: dict[str, StoredSkill] = {}
    # Skills with a workflow are the most informative to read.
    for skill in sorted(stored, key=lambda s: (not s.credited, not s.skill.golden_workflow, -s.mean_reward, s.id)):
        by_task.setdefault(skill.task_id, skill)
    console.print(
        f"\n{len(stored)} skills were written for the teacher, for example these, in words (r2c1 is row 2, column 1). "
        f"As the tiny model reads them: skillsd skills list {run}",
        highlight=False,
        soft_wrap=True,
    )
    for skill in list(by_task.values())[:count]:
        console.print(
            f"  level {skill.task_id}, used for {skill.credited} episodes"
            + (f", mean reward {skill.mean_reward:.2f}" if skill.credited else ""),
            highlight=False,
        )
        shown = task_set.skill_for_people(tasks[skill.task_id], skill.skill)
        parts = {"what worked": shown.success_analysis, "mistake": shown.mistake_analysis}
        for title, text in {**parts, "steps": shown.golden_workflow}.items():
            if text:
                console.print(f"    {title}: {text}", highlight=False, markup=False, soft_wrap=True)
