"""`skillsd demo`: where a skill teaches and where it does not, on equal budgets of episodes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from skillsd.types import TRAIN_SPLIT, Outcome


@dataclass(frozen=True)
class Part:
    """One environment of the demo.

    Attributes:
        name: of its folder and in the summary.
        methods: GRPO first; the last one is Skill-SD, compared with it.
        tasks: what a task is called.
        why: what is to be expected, in a sentence.
    """

    name: str
    recipe: str
    methods: tuple[str, ...]
    tasks: str
    why: str


PARTS = (
    Part(
        "rulebook",
        "rulebook-nano",
        ("grpo", "grpo-imitation", "skill-sd-frozen"),
        "rulebook tasks",
        "Its tasks share hidden rules, success is rare, and a failure tells what was right: what a skill says about "
        "one task helps with the others.",
    ),
    Part(
        "sokoban",
        "sokoban-nano",
        ("grpo", "skill-sd"),
        "Sokoban levels",
        "What a skill says about one level helps with no other level.",
    ),
)

CURVES = ("evaluation.split=test", "evaluation.limit=256")
"""The learning curves are of the split that is tabulated. They select nothing: every run is evaluated at its end."""


def run_demo(folder: Path, seeds: Sequence[int], overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Train each method on each seed in both environments, evaluate the runs and the base models on the test split,
    write ``summary.json``.

    Raises:
        UserError: if a run fails, with the last lines of its log.
    """
    begin = time.perf_counter()
    summary = {part.name: _run(part, folder / part.name, seeds, overrides, console) for part in PARTS}
    write_whole(folder / "summary.json", json.dumps(summary, indent=2))
    console.print()
    for part in PARTS:
        console.print(_verdict(part, summary[part.name]), highlight=False, soft_wrap=True)
    console.print(f"\nLearning curves: {', '.join(str(folder / part.name / PICTURE) for part in PARTS)}")
    console.print(f"Done in {duration(time.perf_counter() - begin)}: {folder}/summary.json")
    return summary


PICTURE = "learning-curves.png"


def _run(part: Part, folder: Path, seeds: Sequence[int], overrides: Sequence[str], console: Console) -> dict[str, Any]:
    settings = (*CURVES, *overrides)
    split = load(RunConfig, part.recipe, settings).evaluation.split
    sweep = plan(part.recipe, settings, folder, methods=part.methods, seeds=seeds, split=split)
    console.print(
        f"Training {' and '.join(part.methods)} on {len(seeds)} seed{'s' * (len(seeds) > 1)}, {sweep.budgets[0]} "
        f"episodes each, {min(jobs_at_once(sweep.config), len(sweep.cells))} at a time, in {folder}/"
    )
    check(sweep)
    _all_usable(sweep)
    if failures := run_cells(sweep, console):
        raise UserError(str(failures[0]))
    check(sweep)
    _all_usable(sweep)
    summary = _summarise(part, sweep)
    save(sweep)
    curves = {method: [curve(cell) for cell in sweep.cells if cell.method == method] for method in part.methods}
    title = f"{part.tasks}, tiny agent"
    learning_curves(curves, folder / PICTURE, title=title, split=_panel(sweep), base=summary[BASE]["accuracy"])
    _show(part, summary, console)
    skill_run = next(cell.folder for cell in sweep.cells if cell.method == part.methods[-1])
    _show_skills(skill_run, load_task_set(sweep.config), console)
    for finding in findings(sweep):
        console.print(in_words(finding), highlight=False, soft_wrap=True)
    return summary


def _verdict(part: Part, summary: Mapping[str, Any]) -> str:
    """What the table says about skills in this environment, in a sentence, and why."""
    skill, grpo = summary[part.methods[-1]], summary["grpo"]
    found = skill["difference"]
    low, high = found["interval"]
    shown = f"{100 * found['mean']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    solved = f"{part.methods[-1]} solves {percent(skill['accuracy'])} of the held-out {part.tasks}"
    figures = f"{solved}, grpo {percent(grpo['accuracy'])}"
    meaning = "a skill teaches here"
    if low <= 0:
        meaning = "skills do harm here" if high < 0 else "no gain from skills shows here"
    return f"{part.name}: {figures}, {shown}: {meaning}. {part.why}"


def _panel(sweep: Sweep) -> str:
    """The tasks of the learning curves, in words."""
    limit = sweep.config.evaluation.limit
    return f"{sweep.split}, {limit} of {sweep.tasks}" if limit and limit < sweep.tasks else sweep.split


def _all_usable(sweep: Sweep) -> None:
    for name, reason in left_out(sweep).items():
        raise UserError(f"{name}: {reason}")


def _summarise(part: Part, sweep: Sweep) -> dict[str, Any]:
    [budget] = sweep.budgets
    [model] = sweep.models
    summary: dict[str, Any] = {
        "recipe": part.recipe,
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
        if row.get("difference"):
            summary[name]["difference"] = row["difference"]["accuracy"]
    return summary


def _show(part: Part, summary: dict[str, Any], console: Console) -> None:
    rows = []
    for name in (BASE, *part.methods):
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
            f"Held-out {part.tasks} ({summary['tasks']}, split {summary['split']}), sampled, plain prompt",
            ["method", "accuracy [95 %]", "completion [95 %]", "greedy", "episodes", "training"],
            rows,
            caption=caption,
        )
    )


def _show_skills(run: Path, task_set: TaskSet, console: Console) -> None:
    """Print skills of three tasks in words: the most successful ones, and one that a failure taught."""
    with Bank(run / BANK) as bank:
        stored = bank.skills()
    tasks = {task.id: task for task in task_set.tasks(TRAIN_SPLIT)}
    # Skills with a workflow are the most informative to read.
    ranked = sorted(stored, key=lambda s: (not s.credited, not s.skill.golden_workflow, -s.mean_reward, s.id))
    chosen = {skill.task_id: skill for skill in ranked if skill.source_outcome is not Outcome.SOLVED}
    shown: dict[str, StoredSkill] = dict(list(chosen.items())[:1])
    for skill in ranked:
        if len(shown) < 3:
            shown.setdefault(skill.task_id, skill)
    console.print(
        f"\n{len(stored)} skills were written for the teacher, for example these, in words. As the tiny model reads "
        f"them: skillsd skills list {run}",
        highlight=False,
        soft_wrap=True,
    )
    for skill in shown.values():
        source = "a success" if skill.source_outcome is Outcome.SOLVED else "a failure"
        console.print(
            f"  task {skill.task_id}, from {source}, used for {skill.credited} episodes"
            + (f", mean reward {skill.mean_reward:.2f}" if skill.credited else ""),
            highlight=False,
            soft_wrap=True,
        )
        words = task_set.skill_for_people(tasks[skill.task_id], skill.skill)
        parts = {"what worked": words.success_analysis, "mistake": words.mistake_analysis}
        for title, text in {**parts, "steps": words.golden_workflow}.items():
            if text:
                console.print(f"    {title}: {text}", highlight=False, markup=False, soft_wrap=True)
