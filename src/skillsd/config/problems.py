"""Validation errors as one line each: the key, what was given, what is allowed, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from skillsd.config.keys import keys, section_class
from skillsd.engines import registry

_MAY_HOLD_A_SECRET = ("api_key_env", "base_url")
"""Users may put an API key here by mistake, so error messages never repeat the value."""


def explain(kind: type[BaseModel], data: Mapping[str, Any], error: ValidationError) -> list[str]:
    """One line per problem."""
    engine = _engine_of(data)
    # For a union pydantic reports one error per member type: keep the first, and the words that were allowed instead.
    problems: dict[tuple[str, ...], dict[str, Any]] = {}
    for problem in error.errors():
        path = problem["loc"][:-1] if problem["type"] == "invalid_key" else problem["loc"]
        kept = problems.setdefault(tuple(_location(kind, path, engine)), dict(problem))
        if problem["type"] == "literal_error" and kept["type"] != "literal_error":
            kept["msg"] += f", or {problem['ctx']['expected']}"
    return [_line(kind, list(location), problem, engine) for location, problem in problems.items()]


def _engine_of(data: Mapping[str, Any]) -> str:
    """The engine whose options are the section ``engine``; the embedded engine if the name is not valid."""
    section = data.get("engine")
    name = section.get("name") if isinstance(section, Mapping) else None
    try:
        registry.options_class(name or "torch")
    except Exception:  # an invalid name is reported as a problem of its own
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
    if key == "engine" and isinstance(problem["input"], Mapping):
        return message  # it names the key and the value
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
    # The same or a similar key of another section, for a name unlike any of this section's.
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
    """The keys of the section at `location`."""
    for part in location:
        section = section_class(kind, part.partition("[")[0], engine)
        if section is None:
            return []
        kind = section
    return list(kind.model_fields)


def _location(kind: type[BaseModel], path: tuple[int | str, ...], engine: str) -> list[str]:
    """Names of the sections and the key: ``["objective", "terms[0]", "fn"]``.

    Drops what pydantic adds below a plain value (an index into a list, one type of a union).
    """
    names: list[str] = []
    inside = True  # a section, not a plain value
    for part in path:
        if not inside:
            break
        if isinstance(part, int):
            names[-1] += f"[{part}]"
            continue
        names.append(part)
        section = section_class(kind, part, engine)
        inside = section is not None
        kind = section or kind
    return names
