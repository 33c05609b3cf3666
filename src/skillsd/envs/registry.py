"""Find environments by name. Third parties register theirs under the entry point group `skillsd.environments`.

An environment's package may bring two more modules: ``setup``, whose function ``setup`` is run by `skillsd envs setup
NAME`, and ``doctor``, whose function ``report`` adds lines to `skillsd doctor`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from skillsd import plugins
from skillsd.envs.base import TaskSet
from skillsd.errors import UserError, unknown_name


def names() -> list[str]:
    """Names of the registered environments."""
    return list(plugins.registered(plugins.ENVIRONMENTS))


def setup_of(name: str) -> Callable[..., None]:
    """The function that `skillsd envs setup NAME` runs.

    Raises:
        UserError: if there is no such environment, or it needs no set-up.
    """
    targets = plugins.registered(plugins.ENVIRONMENTS)
    if name not in targets:
        raise unknown_name("environment", name, targets)
    setup = _hook(targets[name], "setup", "setup")
    if setup is None:
        raise UserError(f"the environment {name!r} needs no set-up: it is ready to use")
    return setup


def doctor_reports() -> dict[str, list[str]]:
    """Environment -> its lines in `skillsd doctor`, of those that have something to say."""
    reports: dict[str, list[str]] = {}
    for name, target in plugins.registered(plugins.ENVIRONMENTS).items():
        try:
            report = _hook(target, "doctor", "report")
            lines = report() if report else []
        except Exception as error:  # a third party's package: the others are reported all the same
            lines = [f"can't be examined: {error}"]
        if lines:
            reports[name] = lines
    return reports


def _hook(target: str, module: str, function: str) -> Callable[..., Any] | None:
    """A function in a module beside the environment's own; None if there is no such module or function.

    Raises:
        UserError: if the module is there and can't be imported.
    """
    path = f"{target.partition(':')[0]}.{module}"
    try:
        hook: Callable[..., Any] = getattr(importlib.import_module(path), function)
    except (ImportError, AttributeError) as error:
        if getattr(error, "name", None) in (path, function) or "is not a package" in str(error):
            return None
        raise UserError(f"{path!r} can't be imported: {error}") from error
    return hook


def load(name: str, options: dict[str, Any] | None = None) -> TaskSet:
    """The task set called `name`, or given as ``module:Class``, made with `options`.

    Raises:
        UserError: if there is no such environment, or it does not take these options.
    """
    targets = plugins.registered(plugins.ENVIRONMENTS)
    factory = plugins.find("environment", name, targets, targets)
    taken = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for option in options or {}:
        if option not in taken and not takes_any:
            raise unknown_name(f"option of the environment {name!r}", str(option), taken)
    try:
        task_set: TaskSet = factory(**(options or {}))
    except TypeError as error:
        raise UserError(f"environment {name!r} does not take the options {options}: {error}") from error
    return task_set
