"""`skillsd skills uplift` and `skillsd skills gap`: the value of a run's skills, and the teacher's distance.

Both use training tasks only. Nothing is trained or written to the run's folder.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from skillsd.engines.base import Learner, Weights
from skillsd.errors import UserError, unknown_name
from skillsd.evaluation.uplift import Measured, Uplift, by_kind, measure_uplift, summarise_uplift
from skillsd.files.write import write_whole
from skillsd.prompting.templates import render_skill
from skillsd.report.progress import Bars
from skillsd.report.tables import percent, short, table
from skillsd.runs.build import BANK, build, make_engine
from skillsd.runs.lifecycle import load_config
from skillsd.skills.bank import StoredSkill
from skillsd.training import checkpoint
from skillsd.training.run import Run
from skillsd.training.teacher_gap import gap_figures, measure_gap
from skillsd.types import TRAIN_SPLIT

BASE = "base"
"""Instead of an iteration: the untrained model."""


@contextmanager
def opened(folder: Path, at: str | None = None) -> Iterator[Run]:
    """Open a run for inspection: its current bank, with the weights of one checkpoint.

    Args:
        at: iteration of a checkpoint, or ``base`` for the untrained model. None: the last checkpoint.

    Raises:
        UserError: if `folder` is not a run's folder, or has no skills or no such checkpoint.
    """
    config = load_config(folder)
    if not (folder / BANK).is_file():  # opening a missing bank would create it
        raise UserError(f"no skill bank in {str(folder)!r}: expected the file {BANK}")
    if at is not None and at != BASE and not at.isdecimal():
        raise UserError(f"--at is {at!r}: expected the iteration of a checkpoint, or {BASE!r}")
    weights = None if at == BASE else checkpoint.find(folder, None if at is None else int(at))
    run = build(config, folder)
    try:
        if not len(run.bank):
            raise UserError(f"the skill bank of {str(folder)!r} is empty (method {config.method!r})")
        asyncio.run(_load(run, weights))
        yield run
    finally:
        run.close()


async def _load(run: Run, weights: Path | None) -> None:
    if weights is None:
        await run.engine.publish()
    else:
        await checkpoint.load_weights(run.engine, weights)
        run.iteration = checkpoint.number(weights)
    teacher = run.config.teacher
    if run.method.teacher == "none":
        await run.learner.sync_teacher()  # compare with the student itself
    elif run.method.teacher == "synchronised" and run.iteration % teacher.sync_every == 0:
        await run.learner.sync_teacher(1 - (teacher.ema or 0))  # as at the start of the next iteration


# -- uplift ---------------------------------------------------------------------------------------------------------


def show_uplift(
    console: Console,
    folder: Path,
    *,
    episodes: int,
    seed: int,
    at: str | None = None,
    task: str | None = None,
    limit: int | None = None,
    never_picked: bool = False,
    weights: Weights = "student",
    json_out: Path | None = None,
) -> None:
    """Measure and print; see the command's help for the options. Without `at`: the last checkpoint and the base."""
    chosen: list[StoredSkill] = []
    found: dict[int, list[tuple[StoredSkill, Uplift]]] = {}
    for point in (at,) if at is not None else (None, BASE):
        with opened(folder, point) as run:
            chosen = chosen or choose_skills(run, task=task, limit=limit, never_picked=never_picked)
            if run.iteration not in found:
                found[run.iteration] = _measure(console, run, chosen, episodes, seed, weights)
    if not all(found.values()):
        raise UserError(f"no result: for all {len(chosen)} skills an episode failed in every attempt (infrastructure)")
    for iteration, measured in sorted(found.items()):
        console.print(_uplift_table(f"{folder}, {_when(iteration, weights)}", measured, episodes, len(chosen)))
    last = max(found)
    console.print(_ends(found[last]))
    if len(found) == 2:
        console.print(_compared(found[0], found[last], _when(last, weights)), highlight=False, soft_wrap=True)
    if json_out:
        record = {
            "run": str(folder), "weights": weights, "episodes": episodes, "seed": seed,
            **_part_record(last, found[last], len(chosen)),
            **({BASE: _part_record(0, found[0], len(chosen))} if len(found) == 2 else {}),
        }  # fmt: skip
        write_whole(json_out, json.dumps(record, indent=2, ensure_ascii=False))


def _measure(
    console: Console, run: Run, chosen: Sequence[StoredSkill], episodes: int, seed: int, weights: Weights
) -> list[tuple[StoredSkill, Uplift]]:
    """The skills with their uplift, without those whose episodes failed."""
    tasks = {task.id: task for task in run.task_set.tasks(TRAIN_SPLIT)}
    contexts = [(tasks[stored.task_id], render_skill(stored.skill, run.template)) for stored in chosen]
    sides = {(task.id, text) for task, given in contexts for text in (given, "")}
    with _counting(console, "training tasks", episodes * len(sides)) as on_episode:
        uplifts = asyncio.run(
            measure_uplift(
                dataclasses.replace(run.student, weights=weights),
                run.task_set,
                contexts,
                run.budget,
                episodes=episodes,
                seed=seed,
                concurrency=run.config.rollout.concurrency,
                retries=run.config.rollout.retries,
                on_episode=on_episode,
            )
        )
    return [(chosen[uplift.place], uplift) for uplift in uplifts]


def _when(iteration: int, weights: Weights) -> str:
    return f"{weights} after {iteration} iterations" if iteration else "base (untrained)"


def _uplift_table(title: str, measured: Measured, episodes: int, chosen: int) -> Any:
    rows = [_uplift_row(kind, those) for kind, those in {"all": measured, **by_kind(measured)}.items()]
    columns = ["skills", "count", "tasks", "with", "without", "uplift [95 %]", "reward uplift [95 %]", "> 0", "< 0"]
    caption = (
        f"Success with and without the skill in the prompt, {episodes} episodes each, on training tasks. All tasks "
        "have the same weight. Intervals are over tasks, as the skills of one task are not independent."
    )
    if lost := chosen - len(measured):
        caption += f" Excluded after infrastructure failures: {lost}."
    return table(title, columns, rows, caption)


def _compared(base: Measured, now: Measured, name: str) -> str:
    """The uplift for the base and for the trained model, and what a difference means."""
    before, after = summarise_uplift(base), summarise_uplift(now)
    text = (
        f"Uplift of the same skills: base {_points(before.success)} ({percent(before.without_skill)} without them), "
        f"{name} {_points(after.success)} ({percent(after.without_skill)} without them)."
    )
    if before.success_interval[0] > 0 and after.success_interval[0] <= 0:
        text += (
            " The model has outgrown them: the skills describe how a weaker student played, and the trained one does "
            "as well or better on its own."
        )
        if after.success_interval[1] < 0:
            text += " Following them now even costs successes."
        text += " A skill teaches while its uplift is above 0; later episodes bring new skills (docs/method.md)."
    return text


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points"


def _part_record(iteration: int, measured: Measured, chosen: int) -> dict[str, Any]:
    groups = {"all": measured, **by_kind(measured)}
    return {
        "iteration": iteration,
        "left_out": chosen - len(measured),
        "summary": {kind: dataclasses.asdict(summarise_uplift(those)) for kind, those in groups.items()},
        "skills": [_uplift_record(stored, uplift) for stored, uplift in measured],
    }


def choose_skills(
    run: Run, *, task: str | None = None, limit: int | None = None, never_picked: bool = False
) -> list[StoredSkill]:
    """The skills to measure, newest first.

    Args:
        never_picked: include skills that were never picked.

    Raises:
        UserError: if there are none.
    """
    known = {task.id for task in run.task_set.tasks(TRAIN_SPLIT)}
    stored = run.bank.skills(task)
    if not stored:
        hint = "" if task in known else ", which is not a training task"
        raise UserError(f"no skill of task {task!r}{hint} in {str(run.folder)!r} (see: skillsd skills list)")
    if gone := sorted({skill.task_id for skill in stored} - known):
        raise UserError(f"the bank has skills of {gone[0]!r}, which is no longer a training task of this environment")
    chosen = [skill for skill in stored if never_picked or skill.picks]
    if not chosen:
        raise UserError(f"none of these {len(stored)} skills was ever picked: include them with --all")
    return chosen[::-1][:limit]


def _uplift_row(kind: str, those: Measured) -> list[str]:
    figures = summarise_uplift(those)
    return [
        kind,
        str(figures.skills),
        str(figures.tasks),
        percent(figures.with_skill),
        percent(figures.without_skill),
        percent(figures.success, figures.success_interval),
        percent(figures.reward, figures.reward_interval),
        percent(figures.better),
        percent(figures.worse),
    ]


def _ends(measured: Measured, count: int = 5) -> Any:
    order = sorted(measured, key=lambda pair: (-pair[1].success, -pair[1].reward, pair[0].id))
    shown = order if len(order) <= 2 * count else order[:count] + order[-count:]
    rows = [
        [
            str(stored.id),
            stored.task_id,
            stored.source_outcome.value,
            percent(uplift.success_with),
            percent(uplift.success_without),
            percent(uplift.success),
            short(stored.skill.golden_workflow or stored.skill.mistake_analysis or stored.skill.success_analysis),
        ]
        for stored, uplift in shown
    ]
    title = "Highest and lowest uplift" if len(order) > len(shown) else "Skills by uplift"
    caption = "Selected by result, so partly by chance. To confirm, measure again with another --seed."
    columns = ["id", "task", "source outcome", "with", "without", "uplift", "text"]
    return table(title, columns, rows, caption, ("task", "source outcome", "text"))


def _uplift_record(stored: StoredSkill, uplift: Uplift) -> dict[str, Any]:
    figures = {**dataclasses.asdict(uplift), "success": uplift.success, "reward": uplift.reward}
    del figures["place"]
    about = {**dataclasses.asdict(stored), "source_outcome": stored.source_outcome.value}
    return {**about, "mean_reward": stored.mean_reward, "uplift": figures}


# -- the teacher's gap ----------------------------------------------------------------------------------------------


def show_gap(
    console: Console,
    folder: Path,
    *,
    episodes: int,
    seed: int,
    at: str | None = None,
    tasks: int | None = None,
    teacher: str = "run",
    json_out: Path | None = None,
) -> None:
    """Measure and print; see the command's help for the options."""
    if teacher not in ("run", BASE):
        raise unknown_name("teacher", teacher, ("run", BASE))
    with opened(folder, at) as run:
        other: tuple[Learner, Weights] | None = None
        if teacher == BASE:
            other = (
                make_engine(run.config.model_copy(update={"engine": run.config.engine.for_learner()})).learner,
                "student",
            )
        count = len(run.task_set.tasks(TRAIN_SPLIT)[:tasks])
        with _counting(console, "training tasks", episodes * count) as on_episode:
            gap = asyncio.run(
                measure_gap(run, episodes=episodes, seed=seed, tasks=tasks, teacher=other, on_episode=on_episode)
            )
        iteration = run.iteration
    if not gap.turns:
        raise UserError(
            f"nothing to compare: {gap.without_teacher} tasks have no context for the teacher, {gap.dropped} failed"
        )
    figures = gap_figures(gap.turns)
    rows = [
        [
            str(row["split"]),
            str(row["turns"]),
            f"{row['count']:,}",
            f"{row['tokens']:,}",
            *(f"{row[name]:.4f}" for name in ("log_ratio", "abs_log_ratio", "kl")),
            percent(float(row["turns_moved"])),
        ]
        for row in figures
    ]
    columns = ["", "turns", "count", "tokens", "mean l", "mean |l|", "KL(student || teacher)", "argmax differs"]
    caption = (
        f"{gap.episodes} episodes of {gap.tasks} training tasks. Excluded: {gap.without_teacher} tasks without a "
        f"context for the teacher, {gap.dropped} tasks after infrastructure failures. l: student minus teacher "
        "log-prob of the sampled token; means are over tokens. Last column: share of turns where the most likely token "
        "differs at least once."
    )
    title = f"{folder} after {iteration} iterations, teacher: {teacher}"
    console.print(table(title, columns, rows, caption, ("turns",)))
    if json_out:
        about = {name: getattr(gap, name) for name in ("tasks", "episodes", "without_teacher", "dropped")}
        record = {
            "run": str(folder),
            "iteration": iteration,
            "teacher": teacher,
            "seed": seed,
            **about,
            "rows": figures,
        }
        write_whole(json_out, json.dumps(record, indent=2))


@contextmanager
def _counting(console: Console, name: str, total: int) -> Iterator[Callable[[object], None]]:
    """A progress bar that counts episodes."""
    bars, done = Bars(console), 0

    def on_episode(trajectory: object) -> None:
        nonlocal done
        done += 1
        bars.update(name, done, total)

    with bars.shown():
        yield on_episode
