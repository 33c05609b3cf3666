"""Find engines by name. Third parties register their options class under the entry point group `skillsd.engines`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skillsd import plugins
from skillsd.engines.options import EngineOptions
from skillsd.errors import UserError


def names() -> list[str]:
    """Names of the registered engines."""
    return list(plugins.registered(plugins.ENGINES))


def options_class(name: str) -> type[EngineOptions]:
    """The options class of the engine called `name`, or given as ``module:Class``.

    Raises:
        UserError: if there is no such engine, or it is not an `EngineOptions`.
    """
    targets = plugins.registered(plugins.ENGINES)
    found = plugins.find("engine", name, targets, targets)
    if not (isinstance(found, type) and issubclass(found, EngineOptions)):
        raise UserError(f"engine {name!r} is {found!r}, expected a subclass of skillsd.engines.options.EngineOptions")
    return found


def owners(key: str) -> list[str]:
    """The registered engines that have an option called `key`."""
    return [name for name in names() if key in options_class(name).model_fields]


def options(section: Mapping[str, Any]) -> EngineOptions:
    """The typed options of a recipe's section ``engine``; the embedded engine if it gives no name.

    Raises:
        UserError: for an unknown engine.
        pydantic.ValidationError: for keys or values that do not fit it.
    """
    name = section.get("name", "torch")
    if not isinstance(name, str):
        raise UserError(f"engine.name is {name!r}, expected the name of an engine: {', '.join(names())}")
    return options_class(name).model_validate({**section, "name": name})
