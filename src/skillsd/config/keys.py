"""A configuration's keys: sections, defaults, types and meanings, as its classes state them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from skillsd.engines import registry


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Attributes:
        path: dotted, e.g. ``training.learning_rate``.
        default: as YAML would have it; None is also a value, see `required`.
        kind: its type in words.
        meaning: its documentation, on one line.
    """

    path: str
    default: Any
    required: bool
    kind: str
    meaning: str


def section_class(kind: type[BaseModel], name: str, engine: str = "torch") -> type[BaseModel] | None:
    """The class of a section, or None if `name` is a plain value.

    Args:
        engine: whose options the section ``engine`` has.
    """
    field = kind.model_fields.get(name)
    if field is None:
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return registry.options_class(engine) if name == "engine" else candidate
    return None


def sections(kind: type[BaseModel], engine: str = "torch") -> dict[str, type[BaseModel]]:
    """Name -> class of the sections of a configuration, those inside other sections by their dotted path."""
    found: dict[str, type[BaseModel]] = {}
    for name in kind.model_fields:
        inner = section_class(kind, name, engine)
        if inner is not None and name != "learner":
            found[name] = inner
            found |= {f"{name}.{path}": deeper for path, deeper in sections(inner, engine).items()}
    return found


def keys(kind: type[BaseModel], prefix: str = "", engine: str = "torch") -> Iterator[Key]:
    """Every key of a configuration, section by section."""
    for name, field in kind.model_fields.items():
        inner = section_class(kind, name, engine)
        if inner is None or name == "learner":
            yield _key(prefix + name, field)
        else:
            yield from keys(inner, f"{prefix}{name}.", engine)


def summary(kind: type[BaseModel]) -> str:
    """The first sentence of a section's documentation."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())


def _key(path: str, field: FieldInfo) -> Key:
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    if isinstance(default, BaseModel):
        default = default.model_dump()
    meaning = " ".join((field.description or "").split()).replace("``", "`")
    return Key(path, default, field.is_required(), _words(field.annotation), meaning)


def _words(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if origin in (list, dict):
        return origin.__name__
    if origin is not None:
        return " | ".join("none" if part is type(None) else _words(part) for part in get_args(annotation))
    names = {"bool": "true | false", "str": "text", "float": "number", "int": "whole number"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)
