"""Environments of tools: over a socket with a scripted server, served to others, and by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("websockets", reason="needs skillsd[openenv]")
pytest.importorskip("uvicorn", reason="needs skillsd[serve]")

from openenv_kit import Scripted, error, observation, running
from toy_env import Toy

from skillsd.envs import values
from skillsd.envs.base import Step
from skillsd.envs.checked import checked
from skillsd.envs.openenv.environment import OpenEnv
from skillsd.envs.openenv.server import Server
from skillsd.envs.openenv.tools import result_text
from skillsd.envs.play import play
from skillsd.envs.tools import write_action
from skillsd.errors import UserError
from skillsd.types import Message, Tool

SCHEMA = {
    "action": {"properties": {"type": {}, "tool_name": {}, "arguments": {}}},
    "observation": {"properties": {"tool_name": {"type": "string"}, "result": {}, "error": {}}},
}
SAY = Tool("say", "Says a word.", {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]})
LISTED = {"name": SAY.name, "description": SAY.description, "inputSchema": SAY.parameters}
SEEDS = {"train": {"seeds": "0-3"}, "test": {"seeds": "100-101"}}


def _server(answer: Any, tools: Any) -> Scripted:
    return Scripted(answer, SCHEMA, {"POST /mcp": {"jsonrpc": "2.0", "id": 1, "result": {"tools": tools}}})


def _say(*words: str) -> str:
    return write_action("", [{"name": "say", "arguments": {"word": word}} for word in words])


async def _played(tasks: OpenEnv, *actions: str) -> tuple[tuple[Message, ...], list[Step]]:
    environment = tasks.make()
    try:
        prompt = await environment.reset(tasks.tasks("train")[0], 7)
        return prompt, [await environment.step(action) for action in actions]
    finally:
        await environment.close()


def _answer(kind: str, data: dict[str, Any]) -> Any:
    if kind == "reset":
        return observation()
    word = data["arguments"]["word"]
    if word == "refused":
        return error("VALIDATION_ERROR", "not this word")
    return observation(float(word == "hello"), word == "hello", tool_name="say", result=f"said {word}", error=None)


def test_calls_are_steps_of_the_server() -> None:
    server = _server(_answer, [LISTED])
    with running(server.app) as url:
        tasks = OpenEnv(url=url, splits=SEEDS, instructions="Say hello.")
        assert tasks.tools == (SAY,)
        prompt, steps = asyncio.run(_played(tasks, "hello", _say("a", "b"), _say("a", "refused"), _say("hello", "b")))
    assert prompt == (Message("user", "Say hello."),)
    assert [step.observation for step in steps] == [
        "Invalid action: the answer calls no tool. Call one of these: say",
        "said a\n\nsaid b",
        "said a\n\nInvalid action: not this word",
        "said hello",
    ]
    assert [(step.reward, step.success) for step in steps] == [(0.0, False)] * 3 + [(1.0, True)]
    sent = [data for kind, data in server.received if kind == "step"]
    assert sent[0] == {"type": "call_tool", "tool_name": "say", "arguments": {"word": "a"}}
    assert [data["arguments"]["word"] for data in sent] == ["a", "b", "a", "refused", "hello"]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([], r"takes calls of tools \(MCP\) but lists no tools"),
        ("many", "expected a list of tools"),
        ([{"name": "a b"}], r"lists a tool that can't be used: .*tools\[0\].name"),
        ([{"name": "a", "input_schema": 7}], "lists a tool that can't be used"),
        ([LISTED, LISTED], "another name for each tool"),
    ],
)
def test_a_list_of_tools_that_does_not_fit_is_one_line(tools: Any, reason: str) -> None:
    with running(_server(_answer, tools).app) as url, pytest.raises(UserError, match=reason) as found:
        OpenEnv(url=url, splits=SEEDS).check_machine()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"error": {"error_type": "timeout", "message": "too slow"}, "result": None}, "Error: too slow"),
        ({"error": "broken"}, "Error: broken"),
        ({"result": {"content": [{"type": "text", "text": "a"}, {"type": "image"}, {"text": "b"}]}}, "a\nb"),
        ({"result": {"content": [], "data": 3}}, '{"content": [], "data": 3}'),
        ({"result": {"content": 3}}, '{"content": 3}'),
        ({"result": "words"}, "words"),
        ({"result": None}, "(empty)"),
        ({"result": " "}, "(empty)"),
    ],
)
def test_what_the_agent_reads_of_a_result(given: dict[str, Any], text: str) -> None:
    assert result_text(given) == text


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("say", "a sequence of Tool"),
        (["say"], r"tools\[0\] is .*a Tool"),
        ([Tool("say it", "", {})], "letters, digits"),
        ([SAY, SAY], "another name"),
        ([Tool("say", "", {"x": {1}})], "JSON"),
        ([Tool("say", None, {})], "text"),  # type: ignore[arg-type]
    ],
)
def test_invalid_tools_are_refused(tools: Any, reason: str) -> None:
    with pytest.raises(values.InvalidError, match=reason):
        values.tools(tools)


class WithTools(Toy):
    tools = (SAY,)


def test_tools_are_part_of_the_fingerprint_and_not_served() -> None:
    assert checked(WithTools()).tools == (SAY,)
    assert WithTools().fingerprint("train") != Toy().fingerprint("train")
    with pytest.raises(UserError, match="has tools, which can't be served yet"):
        Server(WithTools())


def test_people_see_the_tools() -> None:
    shown: list[str] = []
    play(WithTools(), "train", 0, input=lambda prompt: "q", print=shown.append)
    assert shown[1].startswith("Tool say: Says a word. Arguments: {")
    assert shown[2].startswith('An action is JSON: {"calls": ')
