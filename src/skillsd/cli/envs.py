"""`skillsd envs ...`: environments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from skillsd.cli.common import console, listed
from skillsd.errors import UserError, unknown_name
from skillsd.files.read import YamlError, parse_yaml
from skillsd.types import TRAIN_SPLIT

if TYPE_CHECKING:
    from skillsd.envs.checked import CheckedTaskSet

app = typer.Typer(help="List, play, serve or set up environments.", no_args_is_help=True)


Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the environment (`skillsd envs list`), or module:Class.")
]

Options = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="OPTION=VALUE", help="Options of the environment, e.g. preset=paper."),
]


@app.command("list")
def envs_list() -> None:
    """List the environments: what is ready, and how to set up the rest."""
    from skillsd.envs.listing import lines

    for line in lines():
        _say(line)


@app.command("play")
def envs_play(
    name: Name,
    options: Options = None,
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
    from skillsd.envs.play import play

    given = _values(options)
    if levels is not None:
        if "levels" in given:
            raise UserError(f"levels is given twice: as {given['levels']!r} and with --levels {str(levels)!r}")
        given["levels"] = str(levels)
    task_set = _loaded(name, given)
    if split is None:
        split = TRAIN_SPLIT if TRAIN_SPLIT in task_set.splits else task_set.splits[0]
    play(task_set.for_people(), split, int(task) if task.isdecimal() else task)


@app.command("serve")
def envs_serve(
    name: Name,
    options: Options = None,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free one.", min=0, max=65535)] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on. The default is for clients on this machine only.")
    ] = "127.0.0.1",
    splits: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Splits to serve, e.g. train: leaves the held-out ones out.", show_default="all"),
    ] = None,
    sessions: Annotated[int, typer.Option(help="Maximum number of episodes at a time.", min=1)] = 256,
) -> None:
    """Serve an environment's tasks to OpenEnv clients, such as TRL."""
    from skillsd.envs.openenv.serving import serve

    task_set = _loaded(name, _values(options))
    serve(task_set, _say, host=host, port=port, splits=listed(splits, "--splits"), sessions=sessions)


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

    setups.run(name, _say, {"data": data, "python": python})


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)
    console.file.flush()  # a server's or a set-up's output is read while it runs


def _values(options: list[str] | None) -> dict[str, Any]:
    """``option=value`` as a mapping; values are YAML."""
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
    return given


def _loaded(name: str, options: dict[str, Any]) -> CheckedTaskSet:
    from skillsd.envs import registry

    if name not in registry.names() and ":" not in name:
        raise unknown_name("environment", name, registry.names())
    return registry.load(name, options)
