"""Turn a recipe's YAML and ``key=value`` overrides into a typed configuration, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from skillsd.config.problems import explain
from skillsd.config.schema import RunConfig
from skillsd.config.sft import SftConfig
from skillsd.errors import UserError, unknown_name
from skillsd.files.read import YamlError, parse_yaml, read_yaml

RECIPES = Path(__file__).parents[1] / "recipes"

C = TypeVar("C", bound=BaseModel)

COMMANDS: dict[type[BaseModel], str] = {RunConfig: "skillsd train", SftConfig: "skillsd sft"}
"""The command for each kind of recipe."""


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(kind: type[C], recipe: str, overrides: Iterable[str] = ()) -> C:
    """Load a recipe with ``key=value`` overrides.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.

    Raises:
        UserError: for an unknown recipe, unreadable YAML, or an invalid key or value.
    """
    data = read(recipe)
    other = SftConfig if kind is RunConfig else RunConfig
    if any(key in other.model_fields and key not in kind.model_fields for key in data):
        raise UserError(f"recipe {recipe!r} is for `{COMMANDS[other]}`, not for `{COMMANDS[kind]}`")
    for override in overrides:
        apply_override(data, override)
    return build(kind, data, where=f"recipe {recipe!r}")


def read(recipe: str) -> dict[str, Any]:
    """A recipe's keys and values, as in its YAML.

    Raises:
        UserError: for an unknown recipe or unreadable YAML.
    """
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe).expanduser()
    if path.is_dir():
        raise UserError(f"{recipe!r} is a folder: give a YAML file, or one of: {', '.join(recipes())}")
    if not path.is_file():
        if "/" in recipe or path.suffix:
            raise UserError(f"there is no recipe file {recipe!r}. Shipped recipes: {', '.join(recipes())}")
        raise unknown_name("recipe", recipe, recipes())
    data = read_yaml(path, "the recipe")
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"contains a {type(data).__name__}"
        raise UserError(f"the recipe {str(path)!r} {found}, expected keys and values")
    return data


def build(kind: type[C], data: Mapping[str, Any], *, where: str) -> C:
    """Validate keys and values.

    Raises:
        UserError: with a line for every problem.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in explain(kind, data, error))) from error


def dump(config: BaseModel) -> str:
    """The complete configuration as YAML. `load` restores it exactly."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def key_of(override: str) -> str:
    """The key of a ``key=value`` override."""
    return override.partition("=")[0]


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""A number that YAML 1.1 reads as a string, such as 1e-4."""


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set the value of a ``key=value`` override in a recipe's data, creating missing sections.

    Raises:
        UserError: if it is not ``key=value`` with a value in YAML, or the key is below a plain value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override: write key=value, e.g. training.learning_rate=1e-4")
    try:
        value = parse_yaml(text)
    except YamlError as error:
        raise UserError(f"the value of {override!r} is not readable as YAML: {' '.join(str(error).split())}") from error
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    *parents, leaf = key.split(".")
    here = data
    for part in parents:
        inner = here.get(part)
        if inner is None:
            inner = here[part] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{override!r}: {part!r} is a value, not a section")
        here = inner
    here[leaf] = value
