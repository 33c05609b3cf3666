"""Find environments by name. Third parties register theirs under the entry point group `skillsd.environments`."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from skillsd.envs.base import TaskSet
from skillsd.errors import UserError, unknown_name

GROUP = "skillsd.environments"


def names() -> list[str]:
    """Names of the registered environments."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def setup_of(name: str) -> Callable[..., None]:
    """What `skillsd envs setup NAME` runs: the function `setup` in a module `setup` of the environment's package.

    Raises:
        UserError: if there is no such environment, or it needs no set-up.
    """
    import skillsd.envs

    packages = {m.name: f"skillsd.envs.{m.name}" for m in pkgutil.iter_modules(skillsd.envs.__path__) if m.ispkg}
    packages |= {point.name: point.module for point in entry_points(group=GROUP)}
    if name not in packages:
        raise unknown_name("environment", name, packages)
    module = f"{packages[name]}.setup"
    try:
        return importlib.import_module(module).setup
    except (ImportError, AttributeError) as error:
        if getattr(error, "name", None) in (module, "setup"):
            raise UserError(f"the environment {name!r} needs no set-up: it is ready to use") from error
        raise UserError(f"the set-up of the environment {name!r}, {module!r}, can't be imported: {error}") from error


def load(name: str, options: dict[str, Any] | None = None) -> TaskSet:
    """The task set called `name`, or given as ``module:Class``, made with `options`.

    Raises:
        UserError: if there is no such environment, or it does not take these options.
    """
    points = {point.name: point.value for point in entry_points(group=GROUP)}
    target = name if ":" in name else points.get(name)
    if target is None:
        raise unknown_name("environment", name, points)
    module, _, attribute = target.partition(":")
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a module of the user's own lies where the command is given
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"environment {name!r} names {target!r}, which can't be imported: {error}") from error
    taken = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for option in options or {}:
        if option not in taken and not takes_any:
            raise unknown_name(f"option of the environment {name!r}", str(option), taken)
    try:
        return factory(**(options or {}))
    except TypeError as error:
        raise UserError(f"environment {name!r} does not take the options {options}: {error}") from error
