"""`skillsd demo`: GRPO and Skill-SD on the same budget of episodes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from skillsd.errors import UserError
from skillsd.files.write import write_whole
from skillsd.report.pictures import learning_curves
from skillsd.report.progress import duration
from skillsd.report.tables import percent, table
from skillsd.skills.bank import Bank
from skillsd.sweeps.findings import findings, in_words
from skillsd.sweeps.plan import BASE, Sweep, plan
from skillsd.sweeps.results import check, left_out, summarise
from skillsd.sweeps.runner import jobs_at_once, run_cells
from skillsd.sweeps.state import curve

RECIPE = "sokoban-nano"
METHODS = ("grpo", "skill-sd")


def run_demo(folder: Path, seeds: Sequence[int], overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Train each method on each seed, evaluate the runs and the base model on the test split, write ``summary.json``.

    Raises:
        UserError: if a run fails, with the last lines of its log.
    """
    begin = time.perf_counter()
    sweep = plan(RECIPE, overrides, folder, methods=METHODS, seeds=seeds)
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
    picture = folder / "learning-curves.png"
    curves = {method: [curve(cell) for cell in sweep.cells if cell.method == method] for method in METHODS}
    learning_curves(curves, picture, title="Sokoban, tiny agent", split=sweep.config.evaluation.split)
    skill_run = next(cell.folder for cell in sweep.cells if cell.method == METHODS[1])
    _show(summary, skill_run, picture, folder, console, time.perf_counter() - begin)
    for finding in findings(sweep):
        console.print(in_words(finding), highlight=False, soft_wrap=True)
    return summary


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
        "fingerprint": sweep.panels[sweep.split],
        "seeds": list(sweep.seeds),
    }
    kept = ("accuracy", "completion", "interval", "completion_interval", "greedy_accuracy", "episodes", "seconds")
    for name, row in summarise(sweep)["budgets"][str(budget)].items():
        by_seed: Mapping[str, Any] = row["by_model"][model]
        summary[name.replace("-", "_")] = {key: row[key] for key in kept} | {
            key: list(by_seed[key].values()) for key in ("accuracy_by_seed", "greedy_accuracy_by_seed")
        }
    return summary


def _show(
    summary: dict[str, Any], skill_run: Path, picture: Path, folder: Path, console: Console, seconds: float
) -> None:
    rows = []
    for name in (BASE, *METHODS):
        row = summary[name.replace("-", "_")]
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
    with Bank(skill_run / "skills.sqlite") as bank:
        stored = bank.skills()
    used = sorted(  # skills with a workflow are the most informative to read
        (s for s in stored if s.credited), key=lambda s: (not s.skill.golden_workflow, -s.mean_reward, s.id)
    )[:3]
    console.print(f"\nExamples of the {len(stored)} skills written for its teacher:")
    for skill in used:
        console.print(
            f"  task {skill.task_id}, used for {skill.credited} episodes, mean reward {skill.mean_reward:.2f}"
        )
        for field in ("success_analysis", "mistake_analysis", "golden_workflow"):
            if text := getattr(skill.skill, field):
                console.print(f"    {field}: {text}", highlight=False, markup=False)
    console.print(f"\nLearning curves: {picture}")
    console.print(f"Done in {duration(seconds)}: {folder}/summary.json  (more skills: skillsd skills list {skill_run})")
