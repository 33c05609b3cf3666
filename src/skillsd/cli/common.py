"""What the commands share: consoles, argument types and checks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from skillsd.config.effects import without_effect_in_any
from skillsd.config.load import key_of
from skillsd.config.schema import RunConfig
from skillsd.errors import UserError


def _console(stream: str) -> Console:
    # Text is printed as it is: a model's output may contain rich markup. A file or a pipe has no width.
    wide = None if getattr(sys, stream).isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stream == "stderr", markup=False, emoji=False, width=wide)


console = _console("stdout")
errors = _console("stderr")

SETTING = "KEY=VALUE"

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads this at run time)
    typer.Argument(
        metavar=SETTING,
        help="Settings that override the recipe's, e.g. training.learning_rate=1e-4 (`skillsd config` lists the keys).",
    ),
]

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe (`skillsd recipes`), or path of a YAML file.")
]

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]

JsonOut = Annotated[Optional[Path], typer.Option("--json", help="Also write the results to this JSON file.")]  # noqa: UP045


def note_ineffective(configs: Sequence[RunConfig], overrides: Iterable[str] | None) -> None:
    """Note which settings of the command line have no effect in any of the configurations, and why."""
    for note in without_effect_in_any(configs, map(key_of, overrides or ())):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def check_writable(path: Path) -> None:
    """Check an output file before the work starts, not after it.

    Raises:
        UserError: if it is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r} for {path.name!r}")


def listed(text: str | None, option: str) -> list[str] | None:
    """``a,b`` as a list."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UserError(f"{option} is {text!r}: expected names separated by commas")
    return words


def numbers(text: str | None, option: str) -> list[int] | None:
    """``1,2`` as a list of integers."""
    words = listed(text, option)
    if words is None:
        return None
    if not all(word.isdecimal() for word in words):
        raise UserError(f"{option} is {text!r}: expected whole numbers separated by commas, e.g. 1536,3072")
    return [int(word) for word in words]
