"""From the agent's text to the action of an OpenEnv server, whose JSON schema decides how it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skillsd.errors import UserError, unknown_name

Schema = Mapping[str, Any]


class NoActionError(Exception):
    """The agent's text is no action; the message is for the agent."""


@dataclass(frozen=True)
class TextAction:
    """The whole text is the value of one field."""

    field: str
    instructions = ""

    def parse(self, text: str) -> dict[str, Any]:
        """The action."""
        return {self.field: text}


@dataclass(frozen=True)
class JsonAction:
    """The text has a JSON object that fits a schema: structured actions.

    Attributes:
        schema: shown to the agent. The server checks the rest.
    """

    schema: Schema

    @property
    def instructions(self) -> str:
        """Text for the first prompt."""
        return f"Each of your answers is one JSON object that fits this schema: {json.dumps(self.schema)}"

    def parse(self, text: str) -> dict[str, Any]:
        """The object from the first brace to the last one.

        Raises:
            NoActionError: if that is no JSON object.
        """
        start, end = text.find("{"), text.rfind("}") + 1
        try:
            found = json.loads(text[start:end], parse_constant=_refuse) if 0 <= start < end else None
        except (ValueError, RecursionError) as error:
            raise NoActionError(f"the JSON can't be read: {error}") from None
        if not isinstance(found, dict):
            raise NoActionError("it has no JSON object")
        return found


Actions = TextAction | JsonAction


def actions_of(schema: Schema, field: str | None) -> Actions:
    """How the agent writes an action.

    Args:
        schema: the JSON schema of the server's actions.
        field: the field that takes the agent's text; None: the only field, if it takes text, else JSON.

    Raises:
        UserError: if there is no such field or it does not take text.
    """
    fields = fields_of(schema)
    if field is not None:
        if field not in fields:
            raise unknown_name("field of the environment's actions (option action_field)", field, fields)
        if not takes_text(fields[field]):
            raise UserError(f"action_field is {field!r}, which takes no text: {json.dumps(fields[field])}")
        if others := [name for name in schema.get("required", ()) if name in fields and name != field]:
            raise UserError(
                f"action_field is {field!r}, but an action also needs {', '.join(others)}. Without the option the "
                "agent writes whole actions as JSON"
            )
        return TextAction(field)
    [only, *more] = fields
    if not more and takes_text(fields[only]):
        return TextAction(only)
    return JsonAction(_for_the_agent(schema))


def fields_of(schema: Schema) -> dict[str, Schema]:
    """Field -> its schema, without those that are about the message instead of its content."""
    about = ("metadata", "done", "reward")
    properties = schema.get("properties")
    found = properties if isinstance(properties, Mapping) else {}
    return {str(name): kind for name, kind in found.items() if name not in about and isinstance(kind, Mapping)}


def takes_text(schema: Schema) -> bool:
    """Whether any text fits."""
    return schema.get("type") == "string" and not {"enum", "const", "pattern", "format"} & schema.keys()


def _for_the_agent(schema: Schema) -> Schema:
    """The schema without titles, defaults and the metadata of the message."""
    kept = {name: kind for name, kind in schema.items() if name in ("type", "properties", "required", "$defs")}
    kept["properties"] = fields_of(schema)
    return _without_titles(kept)


def _without_titles(value: Any, names: bool = False) -> Any:
    """A schema without its titles; `names`: whether the keys are names of fields."""
    if isinstance(value, Mapping):
        below = {key: key in ("properties", "$defs") and not names for key in value}
        return {key: _without_titles(inner, below[key]) for key, inner in value.items() if names or key != "title"}
    return [_without_titles(item) for item in value] if isinstance(value, list) else value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
