"""What is wrong with a configuration, in words: the key, what was given, what is allowed, the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from skillsd.config.keys import keys, section_class
from skillsd.engines import registry

_MAY_HOLD_A_SECRET = ("api_key_env", "base_url")
"""A user may put a key here by mistake: what was given is not repeated in the error."""


def explain(kind: type[BaseModel], data: Mapping[str, Any], error: ValidationError) -> list[str]:
    """One line per problem."""
    engine = _engine_of(data)
    # A value that fits none of several types is one problem, however many types there are.
    problems = {tuple(_location(kind, problem["loc"], engine)): dict(problem) for problem in reversed(error.errors())}
    return [_line(kind, list(location), problem, engine) for location, problem in reversed(problems.items())]


def _engine_of(data: Mapping[str, Any]) -> str:
    """The engine whose options the section ``engine`` has; the embedded one if that can't be told."""
    section = data.get("engine")
    name = section.get("name") if isinstance(section, Mapping) else None
    try:
        registry.options_class(name or "torch")
    except Exception:  # an error of its own says so
        return "torch"
    return name or "torch"


def _line(kind: type[BaseModel], location: list[str], problem: dict[str, Any], engine: str) -> str:
    key = ".".join(location)
    if problem["type"] == "invalid_key":
        return f"the key {problem['input']!r}{f' of {key}' if key else ''} is not text"
    if problem["type"] == "extra_forbidden":
        return _unknown(kind, location, engine)
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} is {problem['input']!r}, expected keys and values of its own"
    message = problem["msg"].removeprefix("Value error, ")
    given = "not usable" if key.split(".")[-1] in _MAY_HOLD_A_SECRET else repr(problem["input"])
    return f"{key} is {given}: {message[0].lower()}{message[1:]}"


def _unknown(kind: type[BaseModel], location: list[str], engine: str) -> str:
    *parents, name = location
    prefix = ".".join(parents)
    known = _names(kind, parents, engine)
    listed = f" Known here: {', '.join(sorted(known))}"
    if parents == ["engine"] and (owners := [owner for owner in registry.owners(name) if owner != engine]):
        return (
            f"{prefix}.{name} is an option of the engine {' and '.join(map(repr, owners))}, but engine.name is "
            f"{engine!r}.{listed}"
        )
    everywhere = [key.path for key in keys(kind, engine=engine)]
    exact = [path for path in everywhere if path.split(".")[-1] == name]  # the right name in the wrong section
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    # The same or a similar key of another section, for a name that is far from all of this one's.
    leaves = {path.split(".")[-1]: path for path in reversed(everywhere)}
    elsewhere = [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)]
    suggestion = exact or [".".join(filter(None, [prefix, name])) for name in near] or elsewhere
    if elsewhere and not exact and near and _likeness(name, near[0]) < _likeness(name, elsewhere[0].split(".")[-1]):
        suggestion = elsewhere
    hint = f" Did you mean {suggestion[0]!r}?" if suggestion else ""
    return f"unknown key {'.'.join(location)!r}.{hint}{listed}"


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _names(kind: type[BaseModel], location: list[str], engine: str) -> list[str]:
    for part in location:
        section = section_class(kind, part, engine)
        if section is None:
            return []
        kind = section
    return list(kind.model_fields)


def _location(kind: type[BaseModel], path: tuple[int | str, ...], engine: str) -> list[str]:
    """Names of the sections and the key, without what pydantic adds below (a place in a list, one type of several)."""
    names: list[str] = []
    for part in path:
        if isinstance(part, int):
            break
        names.append(part)
        section = section_class(kind, part, engine)
        if section is None:
            break
        kind = section
    return names
