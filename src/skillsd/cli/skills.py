"""`skillsd skills ...`: look into a run's skill bank."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from skillsd.cli.common import RunFolder, check_writable, console
from skillsd.errors import UserError

app = typer.Typer(help="Look into a run's skill bank.", no_args_is_help=True)


@contextlib.contextmanager
def _bank(target: Path) -> Iterator[Any]:
    from skillsd.skills.bank import Bank

    path = target / "skills.sqlite" if target.is_dir() else target
    if not path.is_file():
        raise UserError(f"no skill bank in {str(target)!r}: give a run's folder or the file skills.sqlite of one")
    with Bank(path) as bank:
        yield bank


Target = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a skill bank's file.")]


@app.command("list")
def skills_list(
    target: Target,
    task: Annotated[Optional[str], typer.Option(help="Only this task's.")] = None,  # noqa: UP045
    limit: Annotated[int, typer.Option(min=1, help="The most lines.")] = 50,
) -> None:
    """A line per skill, those that taught the best rewards first."""
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
    columns = ["id", "task", "written from", "its reward", "picked", "mean credit", "says"]
    more = f"{len(stored) - limit} more: --limit" if len(stored) > limit else ""
    words = ("task", "written from", "says")
    console.print(table(f"{len(stored)} skills", columns, rows, more, words))


@app.command("show")
def skills_show(target: Target, skill: Annotated[int, typer.Argument(help="Its id in `skills list`.")]) -> None:
    """One skill in full, with where it came from and how it did."""
    with _bank(target) as bank:
        found = next((s for s in bank.skills() if s.id == skill), None)
        known = [str(s.id) for s in bank.skills()]
    if found is None:
        raise UserError(f"no skill {skill} in {str(target)!r}; ids go from {known[0]} to {known[-1]}" if known else
                        f"the bank {str(target)!r} is empty")  # fmt: skip
    console.print(json.dumps(_as_json(found), indent=2, ensure_ascii=False), highlight=False, soft_wrap=True)


@app.command("export")
def skills_export(
    target: Target,
    to: Annotated[Optional[Path], typer.Argument(help="A .jsonl file; standard output if not given.")] = None,  # noqa: UP045
) -> None:
    """All skills as JSON lines."""
    if to is not None:
        check_writable(to)
    with _bank(target) as bank:
        lines = "".join(json.dumps(_as_json(s), ensure_ascii=False) + "\n" for s in bank.skills())
    if to is None:
        sys.stdout.write(lines)
    else:
        to.write_text(lines, encoding="utf-8")
        console.print(f"{lines.count(chr(10))} skills -> {to}")


At = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="ITERATION|base", help="Another checkpoint than the last, or the untrained model."),
]


@app.command("uplift")
def skills_uplift(
    target: RunFolder,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes with each skill, and as many without.")] = 8,
    at: At = None,
    task: Annotated[Optional[str], typer.Option(help="Only this task's skills.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(min=1, help="Only so many skills, the newest.")] = None,  # noqa: UP045
    never_picked: Annotated[bool, typer.Option("--all", help="Also the skills that were never picked.")] = False,
    teacher: Annotated[bool, typer.Option("--teacher", help="The teacher's weights play, not the student's.")] = False,
    seed: Annotated[int, typer.Option(help="Of the episodes.")] = 0,
    json_out: Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")] = None,  # noqa: UP045
) -> None:
    """What the skills are worth: success with one in the prompt minus success without, on its own training task."""
    from skillsd.cli.skill_value import show_uplift

    if json_out:
        check_writable(json_out)  # now, not after minutes of playing
    show_uplift(
        console, target, episodes=episodes, seed=seed, at=at, task=task, limit=limit, never_picked=never_picked,
        weights="teacher" if teacher else "student", json_out=json_out,
    )  # fmt: skip


@app.command("gap")
def skills_gap(
    target: RunFolder,
    tasks: Annotated[Optional[int], typer.Option(min=1, help="Only so many training tasks, at random.")] = None,  # noqa: UP045
    episodes: Annotated[int, typer.Option(min=1, help="The student's episodes of each task.")] = 4,
    at: At = None,
    teacher: Annotated[str, typer.Option(help="`run`: the run's teacher; `base`: the untrained model.")] = "run",
    seed: Annotated[int, typer.Option(help="Of the episodes.")] = 0,
    json_out: Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")] = None,  # noqa: UP045
) -> None:
    """Where the teacher, told a skill, differs from the student: by turn, outcome and kind of skill."""
    from skillsd.cli.skill_value import show_gap

    if json_out:
        check_writable(json_out)
    show_gap(console, target, episodes=episodes, seed=seed, at=at, tasks=tasks, teacher=teacher, json_out=json_out)


def _as_json(stored: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(stored), "source_outcome": stored.source_outcome.value, "mean_reward": stored.mean_reward}
