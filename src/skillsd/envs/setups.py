"""Set-ups: what `skillsd envs setup NAME` can do. Other packages register theirs in the entry point group
`skillsd.setups`; a set-up that an environment needs has the environment's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillsd import plugins
from skillsd.errors import UserError, unknown_name

Say = Callable[[str], None]
"""Receives one line of output at a time."""


@dataclass(frozen=True)
class Setup:
    """One set-up.

    Attributes:
        installs: what is installed, and what it takes; e.g. ``AppWorld's engine and our tasks (2 minutes, 400 MB)``.
        done: whether nothing is left to do. Fast: `skillsd envs list` calls it.
        run: ``run(say, **options)``. Finished steps are skipped. Its keyword arguments are the options of the command
            line that it takes, each None if it is not given: ``python`` (the interpreter to install with), and
            ``data`` (a `Path`). Raises `UserError` if it fails.
    """

    installs: str
    done: Callable[[], bool]
    run: Callable[..., None]


def setups() -> dict[str, str]:
    """Name -> ``module:attribute`` of every registered set-up."""
    return plugins.registered(plugins.SETUPS)


def find(name: str) -> Setup:
    """The set-up called `name`.

    Raises:
        UserError: if there is none, or it can't be imported.
    """
    targets = setups()
    if name not in targets:
        if name in plugins.registered(plugins.ENVIRONMENTS):
            raise UserError(f"the environment {name!r} needs no set-up: it is ready to use")
        raise unknown_name("set-up", name, targets)
    found = plugins.find("set-up", name, targets, targets)
    if not isinstance(found, Setup):
        raise UserError(f"set-up {name!r} ({targets[name]}) is a {type(found).__name__}: expected a Setup")
    return found


def run(name: str, say: Say, options: Mapping[str, str | Path | None]) -> None:
    """Run the set-up called `name` with options of the command line.

    Raises:
        UserError: if it does not exist, takes no such option, or fails.
    """
    setup = find(name)
    taken = inspect.signature(setup.run).parameters
    for option, value in options.items():
        if value is not None and option not in taken:
            raise UserError(f"the set-up {name!r} takes no --{option}")
    chosen: dict[str, Any] = {option: value for option, value in options.items() if option in taken}
    setup.run(say, **chosen)
