"""`skillsd models ...`: models with a short name."""

from __future__ import annotations

from typing import Annotated

import typer

from skillsd.cli.common import console
from skillsd.errors import unknown_name

app = typer.Typer(help="List or fetch models with a short name.", no_args_is_help=True)


@app.command("list")
def models_list() -> None:
    """List the short names for model.name and the models' folders.

    model.name also takes folders and Hugging Face hub names.
    """
    from skillsd.engines.torch.models import SHIPPED
    from skillsd.engines.torch.pretrained import NAMES, kept

    for name, path in SHIPPED.items():
        console.print(f"{name:16} shipped: {path}", highlight=False, soft_wrap=True)
    for name, what in NAMES.items():
        console.print(f"{name:16} {what}: {kept(name) or 'not fetched yet'}", highlight=False, soft_wrap=True)


@app.command("fetch")
def models_fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model (`skillsd models list`).")],
) -> None:
    """Fetch a model ahead of time and print its folder."""
    from skillsd.engines.torch.models import SHIPPED, resolve
    from skillsd.engines.torch.pretrained import NAMES

    if name not in (*SHIPPED, *NAMES):
        raise unknown_name("model", name, (*SHIPPED, *NAMES))
    console.print(resolve(name), highlight=False, soft_wrap=True)
