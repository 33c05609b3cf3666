"""`skillsd demo` and `skillsd table`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from skillsd.cli.common import Overrides, Recipe, console, listed, note_ineffective, numbers
from skillsd.cli.report import write_at_end


def add_to(app: typer.Typer) -> None:
    app.command()(demo)
    app.command("table")(make_table)


def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of training seeds per method.")] = 1,
) -> None:
    """Compare GRPO and Skill-SD in two small environments.

    In one of them, the rulebook, a skill teaches; in Sokoban it does not. Trains tiny agents and evaluates them on
    held-out tasks, within minutes on two CPU cores.
    """
    from skillsd.cli.demo import PARTS, run_demo

    run_demo(out, range(seeds), overrides or (), console)
    for part in PARTS:
        write_at_end(out / part.name)


def make_table(
    recipe: Recipe,
    overrides: Overrides = None,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Methods (`skillsd methods`) and labels of --variants, separated by commas.",
            show_default="grpo,skill-sd",
        ),
    ] = None,
    variants: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="YAML file that maps labels to settings, or the name of a shipped one (skill-side)."),
    ] = None,
    models: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Names or folders of base models, separated by commas.", show_default="the recipe's"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of training seeds per method and base model.")] = 1,
    episodes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Training budgets in episodes, separated by commas; one table per budget.",
            show_default="the recipe's length",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Tabulate only this many of the split's tasks, evenly spaced."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sampled episodes per task.")] = 1,
    jobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Number of parallel runs.", show_default="cores / model.threads"),
    ] = None,
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Method that the others are compared with.", show_default="grpo"),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Output folder.", show_default="runs/table-NAME")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what is done and what would be run.")] = False,
) -> None:
    """Compare methods on equal budgets of episodes.

    Trains and evaluates what is missing, and prints a table. The same command resumes where it was stopped.
    """
    from skillsd.sweeps.plan import plan
    from skillsd.sweeps.table import run_table, show_plan

    sweep = plan(
        recipe,
        overrides or (),
        out or Path("runs") / f"table-{Path(recipe).stem}",
        methods=listed(methods, "--methods"),
        variants=variants,
        models=listed(models, "--models"),
        seeds=range(seeds),
        episodes=numbers(episodes, "--episodes"),
        split=split,
        samples=samples,
        limit=limit,
        against=against,
    )
    note_ineffective([cell.config for cell in sweep.cells if cell.trained], overrides)
    if dry_run:
        show_plan(sweep, console)
        return
    complete = run_table(sweep, console, jobs=jobs)
    write_at_end(sweep.out)
    if not complete:
        sys.exit(1)
