"""`skillsd envs ...`: environments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from skillsd.cli.common import console
from skillsd.errors import UserError, unknown_name

app = typer.Typer(help="Environments: list them, play them, set them up.", no_args_is_help=True)


@app.command("list")
def envs_list() -> None:
    """Registered environments with their splits."""
    from skillsd.envs import registry

    for name in registry.names():
        try:
            task_set = registry.load(name)
            splits = ", ".join(f"{split} {len(task_set.tasks(split))}" for split in task_set.splits)
        except Exception as error:  # someone else's package: the others are listed all the same
            splits = f"does not load: {error}"
        console.print(f"{name:16} {splits}", highlight=False)


@app.command("play")
def envs_play(
    name: Annotated[str, typer.Argument(help="An environment (`skillsd envs list`).")],
    options: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[OPTION=VALUE]...", help="Options of the environment, e.g. preset=paper"),
    ] = None,
    split: Annotated[str, typer.Option(help="Which tasks.")] = "train",
    task: Annotated[str, typer.Option(help="A task's number in the split, or its id.")] = "0",
) -> None:
    """Play a task yourself."""
    import yaml

    from skillsd.envs import registry
    from skillsd.envs.play import play

    given: dict[str, Any] = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"{option!r} is no option: write option=value, e.g. preset=paper")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"the value of {option!r} is not readable as YAML") from error
    if name not in registry.names() and ":" not in name:
        raise unknown_name("environment", name, registry.names())
    play(registry.load(name, given).for_people(), split, int(task) if task.isdecimal() else task)


@app.command("setup")
def envs_setup(
    name: Annotated[str, typer.Argument(help="An environment that needs more than this package: appworld.")],
    data: Annotated[Optional[Path], typer.Option(help="A folder with official data: check it.")] = None,  # noqa: UP045
    python: Annotated[Optional[str], typer.Option(help="The Python to set up with [this one].")] = None,  # noqa: UP045
) -> None:
    """Install once what an environment runs on, in the cache folder; what is there already is left alone."""
    from skillsd.envs import registry

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    registry.setup_of(name)(say, data=data, python=python)
