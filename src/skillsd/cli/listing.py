"""`skillsd methods`, `skillsd recipes`, `skillsd doctor`, `skillsd version`."""

from __future__ import annotations

import itertools
from typing import Annotated, Optional

import typer

from skillsd import __version__
from skillsd import config as configs
from skillsd.cli.common import Overrides, console
from skillsd.config.load import COMMANDS
from skillsd.errors import UserError


def add_to(app: typer.Typer) -> None:
    for command in (methods, recipes, doctor, version):
        app.command()(command)


def methods() -> None:
    """List the training methods."""
    from skillsd.methods import METHODS, methods_table

    console.print(methods_table(), highlight=False, soft_wrap=True)
    for row in METHODS.values():
        console.print(f"{row.name}: {row.description}", highlight=False, soft_wrap=True)


def recipes() -> None:
    """List the shipped recipes by command."""
    names = configs.recipes()
    for kind, command in COMMANDS.items():
        console.print(f"for `{command}`:", highlight=False)
        for name in names:
            if not configs.read(name).keys() <= kind.model_fields.keys():
                continue
            lines = (configs.RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
            comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
            first = " ".join(line.lstrip("# ") for line in comment).partition(". ")[0].rstrip(".")
            console.print(f"  {name:24} {first}", highlight=False, soft_wrap=True)


def doctor(
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="RECIPE", help="Also estimate the memory and time of this recipe."),
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Estimate the recipe on paper for this many GPUs, of the kind that the next options give."),
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="Memory of each, GiB.")] = 80.0,
    bandwidth: Annotated[float, typer.Option(help="Bandwidth of its memory, GB/s.")] = 3350.0,
    flops: Annotated[float, typer.Option(help="Its dense arithmetic in the model's dtype, TFLOP/s.")] = 989.0,
) -> None:
    """Show versions and devices, and whether a recipe fits."""
    from skillsd.cli.doctor import examine
    from skillsd.cli.gpu_plan import show_plan
    from skillsd.engines.plan import Gpus

    config = configs.load(configs.RunConfig, recipe, overrides or ()) if recipe else None
    if gpus is None:
        examine(console, config)
        return
    if config is None:
        raise UserError("--gpus estimates a recipe: give one, e.g. skillsd doctor sokoban-qwen3-4b --gpus 8")
    given = {"--gpus": gpus, "--gpu-memory": gpu_memory, "--bandwidth": bandwidth, "--flops": flops}
    for name, value in given.items():
        if value <= 0:
            raise UserError(f"{name} is {value:g}, expected more than 0")
    show_plan(console, config, Gpus(gpus, gpu_memory * 2**30, bandwidth * 1e9, flops * 1e12))


def version() -> None:
    """Print the version."""
    console.print(__version__, highlight=False)
