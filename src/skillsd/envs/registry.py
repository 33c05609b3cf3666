"""Find environments by name. Third parties register theirs under the entry point group `skillsd.environments`."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from skillsd.envs.base import TaskSet
from skillsd.errors import UserError, unknown_name

GROUP = "skillsd.environments"


def names() -> list[str]:
    """Names of the registered environments."""
    return sorted({point.name for point in entry_points(group=GROUP)})


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
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"environment {name!r} names {target!r}, which can't be imported: {error}") from error
    try:
        return factory(**(options or {}))
    except TypeError as error:
        raise UserError(f"environment {name!r} does not take the options {options}: {error}") from error
