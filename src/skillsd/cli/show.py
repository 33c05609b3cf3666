"""`skillsd show`: the recorded episodes of a run, in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from skillsd.cli.common import RunFolder, console
from skillsd.errors import UserError

if TYPE_CHECKING:
    from skillsd.rollouts.groups import RecordedEpisode, RecordedGroup
    from skillsd.runs.opened import OpenRun

SHORT = re.compile(r"(\d+)\.(\d+)\.(\d+)")
LONG = re.compile(r"(?:iteration-)?(\d+)/(.+)/(\d+)")


def add_to(app: typer.Typer) -> None:
    app.command("show")(show)


def show(
    run: RunFolder,
    episode: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="EPISODE",
            help="ITERATION.GROUP.EPISODE as listed, or ITERATION/TASK/EPISODE.",
            show_default="list the episodes",
        ),
    ] = None,
    iteration: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="List the episodes of this iteration.", show_default="the last one"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of episodes to list.")] = 64,
    full: Annotated[bool, typer.Option("--full", help="Show long texts in full.")] = False,
) -> None:
    """Show a training episode, turn by turn.

    With the environment's picture, and the gap between teacher and student at each action. Without EPISODE, list the
    episodes of an iteration whose trajectories were written.
    """
    from skillsd.runs.opened import open_run

    opened = open_run(run)
    if episode is None:
        _list(opened, iteration, limit)
    else:
        _show(opened, episode, full)


def _list(run: OpenRun, iteration: int | None, limit: int) -> None:
    from skillsd.report.episode import visible
    from skillsd.report.tables import table

    written = run.iterations_with_trajectories
    if not written:
        every = run.config.log.trajectories_every
        reason = "log.trajectories_every is 0" if not every else "it has not finished an iteration yet"
        raise UserError(f"{str(run.folder)!r} has no trajectories: {reason}")
    number = written[-1] if iteration is None else iteration
    groups = list(run.groups(number))
    rows = [
        [f"{number}.{place}.{member}", visible(group.task.id), *_figures(group, episode)]
        for place, group in enumerate(groups)
        for member, episode in enumerate(group.episodes)
    ]
    taught = sum(group.taught for group in groups)
    title = f"iteration {number}: {len(rows)} episodes in {len(groups)} groups, {taught} of them with a teacher"
    notes = [f"{len(rows) - limit} more: --limit"] if len(rows) > limit else []
    others = [str(other) for other in written if other != number]
    if others:
        notes.append(f"other iterations (--iteration): {_enumerated(others)}")
    columns = ["episode", "task", "outcome", "reward", "advantage", "turns", "gap", "skill"]
    console.print(table(title, columns, rows[:limit], "; ".join(notes), ("task", "outcome")))
    console.print(
        "gap: the teacher's log-prob minus the student's, mean over the sampled tokens. One episode: "
        f"skillsd show {run.folder} {rows[0][0] if rows else 'EPISODE'}",
        highlight=False,
        soft_wrap=True,
    )


def _figures(group: RecordedGroup, episode: RecordedEpisode) -> list[str]:
    t, gaps = episode.trajectory, episode.gaps
    return [
        t.outcome.value,
        f"{t.reward:.2f}",
        f"{episode.advantage:+.2f}",
        str(len(t.turns)),
        f"{round(sum(gaps) / len(gaps), 3) + 0.0:+.3f}" if gaps else "-",
        "-" if group.skill_id is None else str(group.skill_id),
    ]


def _enumerated(numbers: Sequence[str]) -> str:
    return ", ".join(numbers if len(numbers) <= 12 else [*numbers[:6], "...", *numbers[-5:]])


def _show(run: OpenRun, name: str, full: bool) -> None:
    from skillsd.report.episode import episode_text

    group, member = _find(run, name)
    trajectory = group.episodes[member].trajectory
    try:
        _ = run.task_set
    except UserError as error:
        console.print(f"note: turns are shown as text: {error}", highlight=False, soft_wrap=True)
    for line in episode_text(group, member, lambda turn: run.picture(trajectory, turn), whole=full):
        console.print(line, highlight=False, soft_wrap=True)


def _find(run: OpenRun, name: str) -> tuple[RecordedGroup, int]:
    """The group and the number of the episode in it.

    Raises:
        UserError: if the name has another form, or there is no such episode.
    """
    short, long = SHORT.fullmatch(name), LONG.fullmatch(name)
    match = short or long
    if match is None:
        raise UserError(
            f"the episode is {name!r}: expected ITERATION.GROUP.EPISODE, as `skillsd show {run.folder}` lists it, or "
            "ITERATION/TASK/EPISODE, as a skill's source"
        )
    iteration, which, member = int(match[1]), match[2], int(match[3])
    groups = list(run.groups(iteration))
    if short:
        found = groups[int(which) : int(which) + 1]
    else:
        found = [group for group in groups if group.task.id == which]
    if not found:
        raise UserError(
            f"iteration {iteration} has no group {which}: its groups go from 0 to {len(groups) - 1}"
            if short
            else f"iteration {iteration} has no group of the task {which!r}: `skillsd show {run.folder} --iteration "
            f"{iteration}` lists its {len(groups)}"
        )
    if member >= len(found[0].episodes):
        raise UserError(
            f"there is no episode {member} in this group: its episodes go from 0 to {len(found[0].episodes) - 1}"
        )
    return found[0], member
