"""Environments of tools (MCP) on an OpenEnv server: the list of tools, a call, and its result as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from skillsd.envs import values
from skillsd.envs.openenv.actions import Schema, fields_of
from skillsd.envs.openenv.api import Api
from skillsd.envs.openenv.observations import EMPTY
from skillsd.envs.tools import Call
from skillsd.errors import UserError
from skillsd.types import Tool


def takes_calls(schema: Schema) -> bool:
    """Whether the actions with this JSON schema are calls of tools."""
    fields = fields_of(schema)
    return not fields or {"tool_name", "arguments"} <= fields.keys()


def listed(api: Api) -> tuple[Tool, ...]:
    """The tools of a server's environment, before any reset.

    Raises:
        UserError: if it lists none, or an invalid one.
    """
    found = api.tools()
    try:
        tools = values.tools([_tool(tool) for tool in found if isinstance(tool, dict)])
    except values.InvalidError as error:
        raise UserError(f"the environment at {api.url} lists a tool that can't be used: {error}") from None
    if not tools:
        raise UserError(
            f"the environment at {api.url} takes calls of tools (MCP) but lists no tools: skillsd can't play it"
        )
    return tools


def _tool(given: Mapping[str, Any]) -> Tool:
    schema = given.get("inputSchema") or given.get("input_schema") or {"type": "object", "properties": {}}
    return Tool(given.get("name", ""), given.get("description") or "", schema)


def action_of(call: Call) -> dict[str, Any]:
    """The action that makes a call."""
    return {"type": "call_tool", "tool_name": call.name, "arguments": dict(call.arguments)}


def result_text(observation: Mapping[str, Any]) -> str:
    """What the agent reads of a call's result: the error, the texts, or the data as JSON; never empty."""
    error, result = observation.get("error"), observation.get("result")
    if error:
        return f"Error: {error.get('message') if isinstance(error, dict) else error}"
    content = result.get("content") if isinstance(result, dict) else None
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    text = "\n".join(texts) if texts else "" if result is None else _as_text(result)
    return text if text.strip() else EMPTY


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
