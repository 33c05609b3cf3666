"""From the answers of an OpenEnv server to what the agent reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from skillsd.envs import values
from skillsd.envs.openenv.actions import Schema, fields_of, takes_text
from skillsd.envs.openenv.session import SessionError
from skillsd.types import Message, Role

EMPTY = "(empty)"
"""An observation without text: no observation is empty."""


@dataclass(frozen=True)
class Result:
    """The server's answer to a reset or a step. The reward is in the server's unit; None: it gave none."""

    observation: Mapping[str, Any]
    reward: float | None
    done: bool


def result_of(data: Mapping[str, Any]) -> Result:
    """The answer's data; raises SessionError if they are malformed."""
    observation, reward, done = data.get("observation"), data.get("reward"), data.get("done", False)
    if not isinstance(observation, dict):
        raise SessionError(f"the server sent no observation, but {str(data)[:80]}")
    try:
        number = None if reward is None else values.number(reward, "reward", "the server's reward")
        return Result(observation, number, values.boolean(done, "the server's done"))
    except values.InvalidError as error:
        raise SessionError(str(error)) from None


def text_field(schema: Schema, chosen: str | None) -> str | None:
    """The field of an observation that the agent reads: the chosen one, or the only one with text; None: all."""
    fields = fields_of(schema)
    if chosen in fields:
        return chosen
    texts = [name for name, kind in fields.items() if takes_text(kind)]
    return texts[0] if len(texts) == 1 else None


def read(observation: Mapping[str, Any], field: str | None) -> tuple[str, Mapping[str, Any]]:
    """The text for the agent, never empty, and what it leaves out.

    Args:
        field: the field to read; None: the whole observation as JSON, but for its metadata.
    """
    read = [field] if field is not None else [name for name in observation if name != "metadata"]
    rest = {name: value for name, value in observation.items() if name not in read}
    found = observation.get(field) if field is not None else {name: observation[name] for name in read}
    text = found if isinstance(found, str) else "" if found in (None, {}) else json.dumps(found, ensure_ascii=False)
    return text if text.strip() else EMPTY, rest


def messages(given: Any) -> list[Message]:
    """Chat messages; empty if these are none, or if no user's is among them."""
    listed = given if isinstance(given, list) else []
    found = [
        Message(one["role"], one["content"])
        for one in listed
        if isinstance(one, dict) and one.get("role") in get_args(Role) and isinstance(one.get("content"), str)
    ]
    return found if len(found) == len(listed) and any(message.role == "user" for message in found) else []
