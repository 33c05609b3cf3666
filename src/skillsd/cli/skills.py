"""`skillsd skills ...`: inspect a run's skill bank."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from skillsd.cli.common import JsonOut, RunFolder, check_writable, console
from skillsd.errors import UserError
from skillsd.files.write import write_whole

if TYPE_CHECKING:
    from skillsd.skills.bank import StoredSkill
    from skillsd.types import Message

app = typer.Typer(help="Inspect a run's skill bank.", no_args_is_help=True)


@contextlib.contextmanager
def _bank(target: Path) -> Iterator[Any]:
    from skillsd.skills.bank import Bank

    path = target / "skills.sqlite" if target.is_dir() else target
    if not path.is_file():
        raise UserError(f"no skill bank in {str(target)!r}: give a run's folder, or its file skills.sqlite")
    with Bank(path) as bank:
        yield bank


Target = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its skill bank (skills.sqlite).")]


@app.command("list")
def skills_list(
    target: Target,
    task: Annotated[Optional[str], typer.Option(help="List only this task's skills.")] = None,  # noqa: UP045
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of skills to list.")] = 50,
) -> None:
    """List the skills, highest mean credit first."""
    from skillsd.report.tables import short, table

    with _bank(target) as bank:
        stored = bank.skills(task)
    if not stored:
        raise UserError(f"no skills{f' of task {task!r}' if task else ''} in {str(target)!r}")
    stored.sort(key=lambda s: (-(s.credited > 0), -s.mean_reward, s.id))
    rows = [
        [
            str(s.id),
            s.task_id,
            s.source_outcome.value,
            f"{s.source_reward:.2f}",
            str(s.picks),
            f"{s.mean_reward:.2f}" if s.credited else "-",
            short(s.skill.golden_workflow or s.skill.mistake_analysis or s.skill.success_analysis),
        ]
        for s in stored[:limit]
    ]
    columns = ["id", "task", "source outcome", "source reward", "picks", "mean credit", "text"]
    more = f"{len(stored) - limit} more: --limit" if len(stored) > limit else ""
    words = ("task", "source outcome", "text")
    console.print(table(f"{len(stored)} skills", columns, rows, more, words))


@app.command("show")
def skills_show(
    target: Target,
    skill: Annotated[int, typer.Argument(metavar="ID", help="Id of the skill (`skillsd skills list`).")],
    prompt: Annotated[bool, typer.Option("--prompt", help="Show the teacher's prompt with this skill in it.")] = False,
) -> None:
    """Show a skill in full, with its source and statistics."""
    with _bank(target) as bank:
        found = next((s for s in bank.skills() if s.id == skill), None)
        known = [str(s.id) for s in bank.skills()]
    if found is None:
        raise UserError(f"no skill {skill} in {str(target)!r}; ids go from {known[0]} to {known[-1]}" if known else
                        f"the bank {str(target)!r} is empty")  # fmt: skip
    if prompt:
        for message in _teacher_prompt(target, found):
            console.print(f"[{message.role}]", markup=False, highlight=False)
            console.print(message.content, markup=False, highlight=False, soft_wrap=True)
        return
    console.print(json.dumps(_as_json(found), indent=2, ensure_ascii=False), highlight=False, soft_wrap=True)


def _teacher_prompt(folder: Path, stored: StoredSkill) -> tuple[Message, ...]:
    """The first prompt of the skill's task, with the skill in it."""
    from skillsd.prompting.templates import load_template, render_skill, with_context
    from skillsd.runs.build import load_task_set
    from skillsd.runs.lifecycle import load_config
    from skillsd.types import TRAIN_SPLIT

    config = load_config(folder)
    task_set = load_task_set(config)
    task = next((task for task in task_set.tasks(TRAIN_SPLIT) if task.id == stored.task_id), None)
    if task is None:
        raise UserError(f"{stored.task_id!r}, the task of skill {stored.id}, is no longer a training task")

    async def first_prompt() -> tuple[Message, ...]:
        environment = task_set.make()
        try:
            return await environment.reset(task, 0)
        finally:
            await environment.close()

    text = render_skill(stored.skill, load_template(config.skills.template))
    return with_context(asyncio.run(first_prompt()), text, config.skills.place)


@app.command("export")
def skills_export(
    target: Target,
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="FILE", help="Output file (.jsonl).", show_default="standard output"),
    ] = None,
) -> None:
    """Write all skills as JSON lines."""
    if to is not None:
        check_writable(to)
    with _bank(target) as bank:
        lines = "".join(json.dumps(_as_json(s), ensure_ascii=False) + "\n" for s in bank.skills())
    if to is None:
        sys.stdout.write(lines)
    else:
        write_whole(to, lines)
        console.print(f"{lines.count(chr(10))} skills -> {to}")


At = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="ITERATION|base", help="Checkpoint to use, or `base` for the untrained model.", show_default="the last"
    ),
]


@app.command("uplift")
def skills_uplift(
    target: RunFolder,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes with each skill, and as many without it.")] = 8,
    at: At = None,
    task: Annotated[Optional[str], typer.Option(help="Measure only this task's skills.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(min=1, help="Measure only this many skills, the newest.")] = None,  # noqa: UP045
    never_picked: Annotated[bool, typer.Option("--all", help="Include skills that were never picked.")] = False,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Sample with the teacher's weights, not the student's.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the episodes.")] = 0,
    json_out: JsonOut = None,
) -> None:
    """Measure success with a skill in the prompt minus success without.

    Each skill is measured on its own training task: with the last checkpoint, and with the untrained base model. Skills
    that help the base but no longer the trained model are outgrown. With --at only one of them is measured.
    """
    from skillsd.cli.skill_value import show_uplift

    if json_out:
        check_writable(json_out)
    show_uplift(
        console, target, episodes=episodes, seed=seed, at=at, task=task, limit=limit, never_picked=never_picked,
        weights="teacher" if teacher else "student", json_out=json_out,
    )  # fmt: skip


@app.command("gap")
def skills_gap(
    target: RunFolder,
    tasks: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Use only this many training tasks, drawn at random."),
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Student episodes per task.")] = 4,
    at: At = None,
    teacher: Annotated[str, typer.Option(help="`run` for the run's teacher, `base` for the untrained model.")] = "run",
    seed: Annotated[int, typer.Option(help="Seed of the episodes.")] = 0,
    json_out: JsonOut = None,
) -> None:
    """Measure how far the teacher's distribution is from the student's.

    The result is broken down by turn, outcome and kind of skill.
    """
    from skillsd.cli.skill_value import show_gap

    if json_out:
        check_writable(json_out)
    show_gap(console, target, episodes=episodes, seed=seed, at=at, tasks=tasks, teacher=teacher, json_out=json_out)


def _as_json(stored: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(stored), "source_outcome": stored.source_outcome.value, "mean_reward": stored.mean_reward}
