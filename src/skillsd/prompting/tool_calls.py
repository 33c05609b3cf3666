"""From sampled ids to calls of tools, with the parsers of the package `renderers`.

No setting says how a model writes its calls. A call is rendered with the model's own chat template, and the parser is
the first one of the package that reads it back. So it also works for a fine-tuned model under any name, and a parser
that does not fit the template is never used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from skillsd.envs.tools import write_action
from skillsd.errors import UserError
from skillsd.types import Tool

PROBE = Tool(
    "find_items",
    "Finds items.",
    {
        "type": "object",
        "properties": {
            "words": {"type": "string"},
            "limit": {"type": "integer"},
            "kinds": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["words"],
    },
)
"""A made-up tool. (Without a boolean: some templates write those as Python does, which no parser takes.)"""

ARGUMENTS: Mapping[str, Any] = {"words": 'the "big" one', "limit": 3, "kinds": ["a", "b"]}
"""Of a call of it: values that the formats write differently."""

_NOT_TRIED = "gpt-oss"
"""It downloads a vocabulary, and its chat template is refused anyway."""


def as_function(tool: Tool) -> dict[str, Any]:
    """The form in which chat templates take a tool."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


class CallParser:
    """Reads the calls in sampled ids.

    Args:
        tokenizer: the model's.
        tools: those of the environment.
        probe: the ids of a call of `PROBE` with `ARGUMENTS` as the template writes it: those before the reply, and the
            reply's, without its end.

    Raises:
        UserError: if the package is not installed, or none of its parsers reads the probe.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[Tool], probe: tuple[Sequence[int], Sequence[int]]) -> None:
        self._tools = [as_function(tool) for tool in tools]
        before, reply = map(list, probe)
        asked = [as_function(PROBE)]
        for family, parse in _parsers(tokenizer):
            try:
                found = parse(reply, tools=asked, prompt_ids=before).tool_calls
            except Exception:
                continue
            if [(_error(call), call.name, call.arguments) for call in found] == [(None, PROBE.name, ARGUMENTS)]:
                self.family, self._parse = family, parse
                return
        raise UserError(
            "the environment has tools, but no parser of the package `renderers` reads the calls that the model's chat "
            "template writes: give a model of another family (docs/models.md)"
        )

    def read(self, reply: Sequence[int], before: Sequence[int]) -> tuple[str, list[dict[str, Any]]]:
        """The text and the calls of a reply, without its thinking; see `skillsd.envs.tools`.

        Args:
            reply: the sampled ids, without the end of the turn.
            before: all ids before them.
        """
        parsed = self._parse(list(reply), tools=self._tools, prompt_ids=list(before))
        calls = [
            {"error": error, "raw": call.raw}
            if (error := _error(call))
            else {"name": call.name, "arguments": call.arguments}
            for call in parsed.tool_calls
        ]
        return (parsed.content or "").strip(), calls

    def action(self, reply: Sequence[int], before: Sequence[int]) -> tuple[str, bool]:
        """The action for the environment, and whether the reply has a call (perhaps a malformed one)."""
        text, calls = self.read(reply, before)
        return write_action(text, calls), bool(calls)


def _error(call: Any) -> str | None:
    """Why a call can't be read; None if it was. A tool that does not exist is the environment's to explain."""
    status = str(call.status.value)
    return None if status in ("ok", "unknown_tool") else status.replace("_", " ")


def _parsers(tokenizer: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    try:
        from renderers import config_from_name, create_renderer
        from renderers.base import MODEL_RENDERER_MAP
    except ImportError as error:
        raise UserError(
            f"the environment has tools, and reading their calls needs {error.name}: pip install 'skillsd[tools]'"
        ) from error
    for family in dict.fromkeys(MODEL_RENDERER_MAP.values()):
        if family == _NOT_TRIED:
            continue
        try:
            yield family, create_renderer(tokenizer, config_from_name(family)).parse_response
        except Exception:
            continue
