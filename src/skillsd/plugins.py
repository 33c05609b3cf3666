"""Find code by name: shipped with the package, registered by other packages, or given as ``module:Class``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from skillsd import user_code
from skillsd.errors import EngineFailedError, UserError, unknown_name

ENVIRONMENTS = "skillsd.environments"
SETUPS = "skillsd.setups"
ENGINES = "skillsd.engines"
"""Entry point groups for the environments, their set-ups and the engines of other packages."""

SHIPPED: Mapping[str, Mapping[str, str]] = {
    ENVIRONMENTS: {
        "sokoban": "skillsd.envs.sokoban:Sokoban",
        "appworld": "skillsd.envs.appworld:AppWorld",
        "textworld-express": "skillsd.envs.textworld_express:TextWorldExpress",
        "scienceworld": "skillsd.envs.scienceworld:ScienceWorld",
        "rulebook": "skillsd.envs.rulebook:Rulebook",
        "openenv": "skillsd.envs.openenv:OpenEnv",
    },
    SETUPS: {
        "appworld": "skillsd.envs.appworld.setup:SETUP",
        "textworld-express": "skillsd.envs.textworld_express.setup:SETUP",
        "scienceworld": "skillsd.envs.scienceworld.setup:SETUP",
        "openenv-demo": "skillsd.envs.openenv.demo_setup:SETUP",
    },
    ENGINES: {
        "torch": "skillsd.engines.torch.options:TorchOptions",
        "vllm": "skillsd.engines.vllm.options:VllmOptions",
        "tinker": "skillsd.engines.tinker.options:TinkerOptions",
    },
}
"""Group -> name -> target. Not declared as entry points, so that a source tree works without being installed."""


def registered(group: str) -> dict[str, str]:
    """Name -> ``module:attribute`` of an entry point group, including what ships with the package."""
    found = {point.name: point.value for point in entry_points(group=group)}
    return dict(sorted({**found, **SHIPPED.get(group, {})}.items()))


def find(kind: str, name: str, known: Iterable[str], targets: Mapping[str, str] | None = None) -> Any:
    """The object called `name`: one of `targets`, or given as ``module:attribute``.

    Args:
        kind: the kind of object, for error messages ("environment", "engine" ...).
        known: names to list in the error for an unknown name.
        targets: name -> ``module:attribute``.

    Raises:
        UserError: if the name is unknown or its module can't be imported.
    """
    target = name if ":" in name else (targets or {}).get(name)
    if target is None:
        raise unknown_name(kind, name, known)
    module, _, attribute = target.partition(":")
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # custom modules are usually in the current folder
    user_code.brought_by_user(module)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty module name
        place = user_code.where(error)
        raise UserError(
            f"{kind} {name!r} can't be imported: {error}{f' ({place})' if place else ''}. Expected module:Class, with "
            "the module on the Python path or in the current folder"
        ) from error
    except (Exception, SystemExit) as error:  # the module's own code runs when it is imported
        user_code.record(f"importing {module}", error)
        raise UserError(f"{kind} {name!r} can't be imported: {user_code.describe(error)}") from error


def construct(what: str, given: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Call a class or function that a user brought.

    Args:
        what, given: the object and its arguments, for error messages: "environment 'x'", "without arguments".

    Raises:
        UserError: for whatever it raises, with the file and line.
    """
    try:
        return factory(**options)
    except (UserError, EngineFailedError):
        raise
    except (Exception, SystemExit) as error:
        user_code.record(f"the constructor of {what}", error)
        raise UserError(f"{what} can't be constructed {given}: {user_code.describe(error)}") from error
