"""The reference of all keys: for `skillsd config`, for ``docs/configuration.md``, and as a JSON schema for editors."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from skillsd.config.keys import Key, keys, sections, summary
from skillsd.config.load import COMMANDS
from skillsd.config.schema import RunConfig, engine_schema
from skillsd.config.sft import SftConfig
from skillsd.engines import registry
from skillsd.errors import UserError

Section = tuple[str, str, list[Key]]
"""Name, documentation, keys."""


def find(name: str | None = None, *, sft: bool = False, engine: str = "torch") -> list[Section]:
    """All sections of a configuration, or those that match `name`.

    Args:
        name: a section (with its nested ones), a dotted key, or the last part of either.
        sft: describe warm-start recipes instead of training recipes.
        engine: the engine whose options are the section ``engine``.

    Raises:
        UserError: if there is no such section or key, or no such engine.
    """
    registry.options_class(engine)
    found = list(_sections(SftConfig if sft else RunConfig, engine))
    if name is None:
        return found
    if chosen := [section for section in found if section[0] == name or section[0].startswith(f"{name}.")]:
        return chosen
    if exact := _only(found, lambda key: _plain(key) == name):
        return exact
    if last := _only(found, lambda key: _plain(key).split(".")[-1] == name):
        return last
    known = [s for s, _, _ in found if s] + [_plain(key) for _, _, those in found for key in those]
    by_last_part = {path.split(".")[-1]: path for path in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [
        by_last_part[part] for part in difflib.get_close_matches(name, by_last_part, n=1, cutoff=0.5)
    ]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(s for s, _, _ in found if s)
    raise UserError(f"there is no section or key {name!r}.{hint} Sections: {listed}")


def _only(found: Sequence[Section], fits: Any) -> list[Section]:
    return [(section, about, [key]) for section, about, those in found for key in those if fits(key)]


def _plain(key: Key) -> str:
    return key.path.replace("[]", "")


def _sections(kind: type[BaseModel], engine: str) -> Iterator[Section]:
    every = list(keys(kind, engine=engine))
    yield "", f"Keys of a recipe for `{COMMANDS[kind]}`.", [key for key in every if "." not in key.path]
    for name, section in sections(kind, engine).items():
        yield name, summary(section), [key for key in every if _plain(key).rpartition(".")[0] == name]


def lines(found: Sequence[Section]) -> Iterator[str]:
    """The sections as text for a terminal."""
    for name, about, those in found:
        yield f"{name or 'top level'}: {about}"
        for key in those:
            yield f"  {key.path} = {default(key)}   ({key.kind})"
            yield f"      {key.meaning}"


def markdown(kind: type[BaseModel]) -> str:
    """A table of keys per section, and one per engine for the section ``engine``."""
    parts = []
    for name, about, those in _sections(kind, "torch"):
        if name == "engine":
            parts += [
                _table(f"engine ({other})", summary(registry.options_class(other)), _engine_keys(kind, other))
                for other in registry.names()
            ]
        else:
            parts.append(_table(name or "top level", about, those))
    return "\n\n".join(parts)


def _engine_keys(kind: type[BaseModel], engine: str) -> list[Key]:
    return [key for key in keys(kind, engine=engine) if key.path.startswith("engine.")]


def _table(title: str, about: str, those: Sequence[Key]) -> str:
    rows = [f"| `{key.path}` | `{default(key)}` | {_cell(key.kind)} | {_cell(key.meaning)} |" for key in those]
    return "\n".join([f"### {title}", "", about, "", "| key | default | type | meaning |", "|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def default(key: Key) -> str:
    """A key's default as YAML."""
    if key.required:
        return "(required)"
    if isinstance(key.default, float):
        return f"{key.default:g}"
    if isinstance(key.default, str):
        return key.default
    text = yaml.safe_dump(key.default, default_flow_style=True, sort_keys=False, width=math.inf)
    return text.removesuffix("...\n").strip()


def json_schema(*, sft: bool = False) -> dict[str, Any]:
    """A JSON schema of recipes, for editors with YAML support."""
    schema = (SftConfig if sft else RunConfig).model_json_schema()
    if not sft:
        engine, definitions = engine_schema()
        schema["properties"]["engine"] = engine
        schema["$defs"] |= definitions
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
