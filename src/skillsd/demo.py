"""`skillsd demo`: GRPO and Skill-SD side by side on the same budget of episodes, and what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from skillsd.errors import UserError
from skillsd.report.pictures import learning_curves
from skillsd.report.progress import duration
from skillsd.report.tables import percent, table
from skillsd.report.writer import write_whole
from skillsd.skills.bank import SkillBank
from skillsd.study.plan import BASE, Study, plan
from skillsd.study.results import check, left_out, summarise
from skillsd.study.runner import jobs_at_once, run_cells
from skillsd.study.state import curve

RECIPE = "sokoban-nano"
METHODS = ("grpo", "skill-sd")


def run_demo(folder: Path, seeds: Sequence[int], overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Train each method on each seed, evaluate base and all on the test panel, and write ``summary.json``.

    Raises:
        UserError: if a run fails, with what it said.
    """
    begin = time.perf_counter()
    study = plan(RECIPE, overrides, folder, methods=METHODS, seeds=seeds)
    console.print(
        f"Training {' and '.join(METHODS)} on {len(seeds)} seed{'s' * (len(seeds) > 1)}, {study.budgets[0]} episodes "
        f"each, {min(jobs_at_once(study.config), len(study.cells))} at a time. Everything goes into {folder}/"
    )
    check(study)
    _all_usable(study)
    if failures := run_cells(study, console):
        raise UserError(str(failures[0]))
    check(study)
    _all_usable(study)
    summary = _summarise(study)
    write_whole(folder / "summary.json", json.dumps(summary, indent=2))
    picture = folder / "learning-curves.png"
    curves = {method: [curve(cell) for cell in study.cells if cell.method == method] for method in METHODS}
    learning_curves(curves, picture, title="Sokoban, tiny agent", split=study.config.evaluation.split)
    skill_run = next(cell.folder for cell in study.cells if cell.method == METHODS[1])
    _show(summary, skill_run, picture, folder, console, time.perf_counter() - begin)
    return summary


def _all_usable(study: Study) -> None:
    for name, reason in left_out(study).items():
        raise UserError(f"{name}: {reason}")


def _summarise(study: Study) -> dict[str, Any]:
    [budget] = study.budgets
    [model] = study.models
    summary: dict[str, Any] = {
        "recipe": RECIPE,
        "split": study.split,
        "tasks": study.tasks,
        "fingerprint": study.panels[study.split],
        "seeds": list(study.seeds),
    }
    kept = ("accuracy", "completion", "interval", "completion_interval", "greedy_accuracy", "episodes", "seconds")
    for name, row in summarise(study)["budgets"][str(budget)].items():
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
    caption = "Intervals over the panel's tasks. One seed shows that both learn, not which is better."
    if (seeds := len(summary["seeds"])) > 1:
        caption = f"Intervals over {seeds} training seeds (of the base: over {seeds} draws of its answers)."
    console.print()
    console.print(
        table(
            f"Held-out Sokoban levels ({summary['tasks']}, split {summary['split']}), sampled, plain prompt",
            ["method", "accuracy [95 %]", "completion [95 %]", "greedy", "episodes", "training"],
            rows,
            caption=caption,
        )
    )
    with SkillBank(skill_run / "skills.sqlite") as bank:
        stored = bank.skills()
    # The ones with a workflow say most to a reader.
    taught = sorted(
        (s for s in stored if s.credited), key=lambda s: (not s.skill.golden_workflow, -s.mean_reward, s.id)
    )[:3]
    console.print(f"\nThree of the {len(stored)} skills that it wrote for its teacher:")
    for skill in taught:
        console.print(f"  task {skill.task_id}, taught {skill.credited} episodes, mean reward {skill.mean_reward:.2f}")
        for field in ("success_analysis", "mistake_analysis", "golden_workflow"):
            if text := getattr(skill.skill, field):
                console.print(f"    {field}: {text}", highlight=False, markup=False)
    console.print(f"\nLearning curves: {picture}")
    console.print(f"All of it ({duration(seconds)}): {folder}/  (summary.json; skillsd skills list {skill_run})")
