"""The documentation of all keys: for `skillsd config`, for ``docs/configuration.md``, and as a JSON schema."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

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
    """The sections of a configuration; only one section, or one key of it, if `name` says so.

    Args:
        sft: of a warm-start recipe.
        engine: whose options the section ``engine`` has.

    Raises:
        UserError: if there is no such section or key.
    """
    registry.options_class(engine)
    kind = SftConfig if sft else RunConfig
    found = list(_sections(kind, engine))
    if name is None:
        return found
    chosen = [section for section in found if section[0] == name or section[0].startswith(f"{name}.")]
    if chosen:
        return chosen
    exact = [(s, about, [key]) for s, about, those in found for key in those if key.path == name]
    same_name = [(s, about, [key]) for s, about, those in found for key in those if key.path.split(".")[-1] == name]
    if exact or same_name:
        return exact or same_name
    known = [s for s, _, _ in found if s] + [key.path for _, _, those in found for key in those]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or difflib.get_close_matches(
        name, [path.split(".")[-1] for path in known], n=1, cutoff=0.5
    )
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(s for s, _, _ in found if s)
    raise UserError(f"there is no section or key {name!r}.{hint} Sections: {listed}")


def _sections(kind: type[BaseModel], engine: str) -> Iterator[Section]:
    inner = sections(kind, engine)
    every = list(keys(kind, engine=engine))
    yield "", f"Keys of `{COMMANDS[kind]}`.", [key for key in every if "." not in key.path]
    for name, section in inner.items():
        own = [key for key in every if key.path.rpartition(".")[0] == name]
        yield name, summary(section), own


def lines(found: Sequence[Section]) -> Iterator[str]:
    """For a terminal."""
    for name, about, those in found:
        yield f"{name or 'top level'}: {about}"
        for key in those:
            yield f"  {key.path} = {default(key)}   ({key.kind})"
            yield f"      {key.meaning}"


def markdown(kind: type[BaseModel]) -> str:
    """Tables of all keys, a section each."""
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
    return "\n".join(
        [
            f"### {title}",
            "",
            about.replace("``", "`"),
            "",
            "| key | default | type | meaning |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def default(key: Key) -> str:
    """A key's default as YAML writes it."""
    if key.required:
        return "(required)"
    value = key.default
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def json_schema(*, sft: bool = False) -> dict[str, Any]:
    """A JSON schema of recipes, for editors with YAML support."""
    schema = (SftConfig if sft else RunConfig).model_json_schema()
    if not sft:
        schema["properties"]["engine"] = engine_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
