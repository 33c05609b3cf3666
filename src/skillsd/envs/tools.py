"""Calls of tools: what an environment that states its tools gets as an action.

The action is JSON: ``{"text": "what else the agent wrote", "calls": [{"name": "find", "arguments": {"words": "x"}}]}``.
A call that can't be read is in the list as ``{"error": "invalid json", "raw": "what the agent wrote"}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skillsd.types import Tool

SHOWN = 200
"""Characters of a call that can't be read, in the message to the agent."""


@dataclass(frozen=True)
class Call:
    """A call of a tool that exists, with all of its required arguments. Their types are not checked."""

    name: str
    arguments: Mapping[str, Any]


class NoCallError(Exception):
    """The action has no valid call of a tool; the message is for the agent."""


def write_action(text: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """The action that a reply makes."""
    return json.dumps({"text": text, "calls": list(calls)}, ensure_ascii=False)


def read_calls(action: str, tools: Sequence[Tool]) -> list[Call]:
    """The calls of an action, in order; at least one.

    Raises:
        NoCallError: if there is none, or if one of them is not valid: then none should be made.
    """
    try:
        found = json.loads(action)
        calls = found["calls"]
    except (ValueError, RecursionError, KeyError, TypeError):
        calls = []
    if not isinstance(calls, list) or not calls:
        raise NoCallError(f"the answer calls no tool. Call one of these: {_names(tools)}")
    by_name = {tool.name: tool for tool in tools}
    return [_read(call, by_name) for call in calls]


def _read(call: Any, tools: Mapping[str, Tool]) -> Call:
    call = call if isinstance(call, dict) else {"error": "no object", "raw": json.dumps(call)}
    if "error" in call:
        raise NoCallError(f"a call can't be read ({call['error']}): {str(call.get('raw'))[:SHOWN]}")
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or name not in tools:
        raise NoCallError(f"there is no tool {str(name)[:SHOWN]!r}. The tools are {_names(tools.values())}")
    if not isinstance(arguments, dict):
        raise NoCallError(f"the arguments of {name} are not a JSON object: {json.dumps(arguments)[:SHOWN]}")
    required = tools[name].parameters.get("required")
    missing = [str(key) for key in required if key not in arguments] if isinstance(required, list | tuple) else []
    if missing:
        raise NoCallError(f"the call of {name} lacks these arguments: {', '.join(missing)}")
    return Call(name, arguments)


def _names(tools: Iterable[Tool]) -> str:
    return ", ".join(tool.name for tool in tools)
