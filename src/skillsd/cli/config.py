"""`skillsd config`: every key with its default and meaning, and a JSON schema for editors."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from skillsd.cli.common import console
from skillsd.config.describe import find, json_schema, lines


def add_to(app: typer.Typer) -> None:
    app.command("config")(show_config)


def show_config(
    key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="SECTION|KEY", help="Show only this section or key, e.g. training or skills.pick."),
    ] = None,
    sft: Annotated[bool, typer.Option("--sft", help="Show the keys of warm-start recipes instead.")] = False,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="Show this engine's options in the section `engine`.")
    ] = "torch",
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON schema instead, for editors.")] = False,
) -> None:
    """Show the keys of recipes, with their meanings."""
    if schema:
        print(json.dumps(json_schema(sft=sft), indent=2))
        return
    for line in lines(find(key, sft=sft, engine=engine)):
        console.print(line, highlight=False, soft_wrap=True)
