"""`skillsd envs ...`: environments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from skillsd.cli.common import console
from skillsd.errors import UserError, unknown_name
from skillsd.files.read import YamlError, parse_yaml
from skillsd.types import TRAIN_SPLIT

app = typer.Typer(help="List, play or set up environments.", no_args_is_help=True)


@app.command("list")
def envs_list() -> None:
    """List the environments: their splits, or what is missing and how to set it up."""
    from skillsd.envs.listing import lines

    for line in lines():
        console.print(line, highlight=False, soft_wrap=True)


@app.command("play")
def envs_play(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the environment (`skillsd envs list`).")],
    options: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="OPTION=VALUE", help="Options of the environment, e.g. preset=paper."),
    ] = None,
    levels: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Level file to play, e.g. of Sokoban (XSB). Short for levels=FILE."),
    ] = None,
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Split of the task.", show_default="train, or else the first"),
    ] = None,
    task: Annotated[str, typer.Option(help="Index of the task in the split, or its id.")] = "0",
) -> None:
    """Play a task by hand."""
    from skillsd.envs import registry
    from skillsd.envs.play import play

    given: dict[str, Any] = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"{option!r} is not an option: write option=value, e.g. preset=paper")
        try:
            given[key] = parse_yaml(value)
        except YamlError as error:
            raise UserError(
                f"the value of {option!r} is not readable as YAML: {' '.join(str(error).split())}"
            ) from error
    if levels is not None:
        if "levels" in given:
            raise UserError(f"levels is given twice: as {given['levels']!r} and with --levels {str(levels)!r}")
        given["levels"] = str(levels)
    if name not in registry.names() and ":" not in name:
        raise unknown_name("environment", name, registry.names())
    task_set = registry.load(name, given)
    if split is None:
        split = TRAIN_SPLIT if TRAIN_SPLIT in task_set.splits else task_set.splits[0]
    play(task_set.for_people(), split, int(task) if task.isdecimal() else task)


@app.command("setup")
def envs_setup(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the set-up (`skillsd envs list`).")],
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Check this folder of official data (appworld)."),
    ] = None,
    python: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Python interpreter to set up with.", show_default="this one"),
    ] = None,
) -> None:
    """Install what an environment needs into the cache folder.

    Needed once; finished steps are skipped.
    """
    from skillsd.envs import setups

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    setups.run(name, say, {"data": data, "python": python})
