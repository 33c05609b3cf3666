"""`skillsd demo` and `skillsd table`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from skillsd.cli.common import Overrides, Recipe, console, listed, numbers


def add_to(app: typer.Typer) -> None:
    app.command()(demo)
    app.command("table")(make_table)


def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds per method.")] = 1,
) -> None:
    """Train the tiny agent on Sokoban with GRPO and with Skill-SD, and compare: minutes on two CPU cores."""
    from skillsd.cli.demo import run_demo

    run_demo(out, range(seeds), overrides or (), console)


def make_table(
    recipe: Recipe,
    overrides: Overrides = None,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Rows of `skillsd methods` and labels of the variants, separated by commas [grpo,skill-sd]."),
    ] = None,
    variants: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A YAML file of labels with settings over the recipe, or one of the package by name."),
    ] = None,
    models: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Names or folders of base models, separated by commas [the recipe's]."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of each method on each base model.")] = 1,
    episodes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Training budgets in episodes, separated by commas, one table each [the recipe's length]."),
    ] = None,
    split: Annotated[str, typer.Option(help="Panel of the table.")] = "test",
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Count only this many of the panel's tasks, evenly spaced."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sampled episodes per task.")] = 1,
    jobs: Annotated[Optional[int], typer.Option(min=1, help="Runs at once [cores / model.threads].")] = None,  # noqa: UP045
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Method that the others are compared with [grpo]."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Where everything goes [runs/table-NAME].")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what is done and what would run.")] = False,
) -> None:
    """Compare methods on the same budgets of episodes: train what is missing, evaluate, show a table."""
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
    if dry_run:
        show_plan(sweep, console)
    elif not run_table(sweep, console, jobs=jobs):
        sys.exit(1)
