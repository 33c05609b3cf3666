"""Find environments by name. Other packages register theirs under the entry point group `skillsd.environments`.

An environment's package can define an optional module ``doctor``, whose function ``report`` returns lines for `skillsd
doctor`. What `skillsd envs setup NAME` does is in `skillsd.envs.setups`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from skillsd import plugins
from skillsd.envs import values
from skillsd.envs.base import Environment, TaskSet
from skillsd.envs.checked import CheckedTaskSet, checked
from skillsd.errors import UserError, unknown_name
from skillsd.types import TRAIN_SPLIT, Task

EXPECTED = "expected a subclass of skillsd.envs.TaskSet, or a function that returns one (docs/environments.md)"


def names() -> list[str]:
    """Names of the registered environments."""
    return list(plugins.registered(plugins.ENVIRONMENTS))


def doctor_reports() -> dict[str, list[str]]:
    """Environment name -> its lines in `skillsd doctor`; environments without a report are left out."""
    reports: dict[str, list[str]] = {}
    for name, target in plugins.registered(plugins.ENVIRONMENTS).items():
        try:
            report = _hook(target, "doctor", "report")
            lines = report() if report else []
        except Exception as error:  # a fault in another package must not hide the other reports
            lines = [f"the report failed: {error}"]
        if lines:
            reports[name] = lines
    return reports


def _hook(target: str, module: str, function: str) -> Callable[..., Any] | None:
    """A function in a submodule of the environment's package; None if the module or function does not exist.

    Raises:
        UserError: if the module exists but can't be imported.
    """
    path = f"{target.partition(':')[0]}.{module}"
    try:
        hook: Callable[..., Any] = getattr(importlib.import_module(path), function)
    except (ImportError, AttributeError) as error:
        if getattr(error, "name", None) in (path, function) or "is not a package" in str(error):
            return None
        raise UserError(f"{path!r} can't be imported: {error}") from error
    return hook


def load(name: str, options: dict[str, Any] | None = None) -> CheckedTaskSet:
    """Create the task set registered as `name`, or given as ``module:Class``, with `options`.

    Raises:
        UserError: if the environment does not exist, is no task set, does not accept the options or can't be created.
    """
    targets = plugins.registered(plugins.ENVIRONMENTS)
    factory = plugins.find("environment", name, targets, targets)
    if not callable(factory) or (isinstance(factory, type) and not issubclass(factory, TaskSet)):
        raise _no_task_set(name, factory)
    with suppress(TypeError, ValueError):  # some callables have no signature
        taken = inspect.signature(factory).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        for option in options or {}:
            if option not in taken and not takes_any:
                raise unknown_name(f"option of the environment {name!r}", str(option), taken)
    given = options or {}
    made = plugins.construct(f"environment {name!r}", f"with environment.options {given}", factory, given)
    if not isinstance(made, TaskSet):
        raise _no_task_set(name, made)
    try:
        values.text(getattr(made, "name", None), "name", empty=False)
    except values.InvalidError as error:
        raise UserError(f"the environment {name!r}: {error} (the attribute {type(made).__name__}.name)") from None
    return checked(made)


def _no_task_set(name: str, found: object) -> UserError:
    kind = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
    hint = ""
    if isinstance(found, Environment) or (isinstance(found, type) and issubclass(found, Environment)):
        hint = ". It runs an episode: give the task set that makes it"
    return UserError(f"environment.name is {name!r}, {kind}: {EXPECTED}{hint}")


def tasks_of(task_set: TaskSet, split: str, key: str) -> Sequence[Task]:
    """The tasks of a split.

    Args:
        key: the setting that names the split, for the message.

    Raises:
        UserError: for a split that the environment does not have, with those it has.
    """
    try:
        return task_set.tasks(split)
    except Exception as error:
        if split in task_set.splits:
            raise
        others = ", ".join(name for name in task_set.splits if name != TRAIN_SPLIT) or "none"
        reason = str(error) if isinstance(error, UserError) else "the environment has no such split"
        raise UserError(f"{key} is {split!r}: {reason}. Held-out splits of {task_set.name!r}: {others}") from error
