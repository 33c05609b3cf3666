"""The keys of a configuration, read off its classes: sections, defaults, types and meanings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from skillsd.engines import registry


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Attributes:
        path: dotted, e.g. ``training.learning_rate``. ``[]`` marks a list of sections: ``objective.terms[].fn``.
        default: the default value. None is a valid default; see `required`.
        kind: its type in words.
        meaning: its documentation, on one line.
    """

    path: str
    default: Any
    required: bool
    kind: str
    meaning: str


def section_class(kind: type[BaseModel], name: str, engine: str = "torch") -> type[BaseModel] | None:
    """The class of the section `name`, or None if `name` is a plain value.

    Args:
        engine: the engine whose options are the section ``engine``.
    """
    field = kind.model_fields.get(name)
    if field is None:
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if _is_section(candidate):
            return registry.options_class(engine) if name == "engine" else candidate
    return None


def sections(kind: type[BaseModel], engine: str = "torch") -> dict[str, type[BaseModel]]:
    """Dotted path -> class of every section of a configuration, nested ones included."""
    found: dict[str, type[BaseModel]] = {}
    for name in kind.model_fields:
        inner = section_class(kind, name, engine)
        if inner is not None and name != "learner":
            found[name] = inner
            found |= {f"{name}.{path}": deeper for path, deeper in sections(inner, engine).items()}
    return found


def keys(kind: type[BaseModel], prefix: str = "", engine: str = "torch") -> Iterator[Key]:
    """Every key of a configuration, section by section. A section that can be left out is a key as well."""
    for name, field in kind.model_fields.items():
        inner = section_class(kind, name, engine)
        nested = inner is not None and name != "learner"  # an engine inside an engine: its keys are those of `engine`
        if not nested or not _is_section(field.annotation):
            yield _key(kind, prefix, name)
        if nested:
            assert inner is not None
            each = "[]" if get_origin(field.annotation) is list else ""
            yield from keys(inner, f"{prefix}{name}{each}.", engine)


def summary(kind: type[BaseModel]) -> str:
    """The first paragraph of a section's documentation."""
    return _one_line(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0])


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _key(kind: type[BaseModel], prefix: str, name: str) -> Key:
    field = kind.model_fields[name]
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    if isinstance(default, BaseModel):
        default = default.model_dump()
    return Key(prefix + name, default, field.is_required(), _words(field.annotation), _meaning(kind, name))


def _meaning(kind: type[BaseModel], name: str) -> str:
    """A field's docstring, or that of the field it overrides."""
    fields: Iterator[FieldInfo] = (
        base.model_fields[name] for base in kind.__mro__ if _is_section(base) and name in base.model_fields
    )
    return _one_line(next((field.description for field in fields if field.description), ""))


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


def _words(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _words(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if origin is list:
        return "list of sections" if _is_section(get_args(annotation)[0]) else "list"
    if origin is dict:
        return "mapping"
    if origin is not None:
        return " | ".join("null" if part is type(None) else _words(part) for part in get_args(annotation))
    if _is_section(annotation):
        return "section"
    names = {"bool": "true | false", "str": "text", "float": "number", "int": "integer"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)
