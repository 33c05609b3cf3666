"""Our client and our server with the package `openenv` itself: `skillsd envs setup openenv-demo`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("websockets", reason="needs skillsd[openenv]")
pytest.importorskip("uvicorn", reason="needs skillsd[serve]")

from openenv_kit import free_port, program

from skillsd.envs.conformance import assert_conforms
from skillsd.envs.openenv.actions import JsonAction, TextAction
from skillsd.envs.openenv.demo_setup import SERVER, VENV
from skillsd.envs.openenv.environment import OpenEnv
from skillsd.envs.openenv.session import SessionError
from skillsd.envs.sokoban import Sokoban
from skillsd.envs.tools import write_action
from skillsd.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the environment with `openenv`."""
    if not VENV.installed():
        pytest.skip(f"openenv is not installed; to get it: {VENV.command}")
    return VENV.interpreter


# -- our client, their server ---------------------------------------------------------------------------------------


def test_the_demo_conforms(python: Path, tmp_path: Path) -> None:
    """An environment with a TaskProvider, and text actions."""
    port = free_port()
    with program([python, SERVER, "--port", str(port)], port, tmp_path) as url:
        tasks = OpenEnv(url=url, max_turns=8)
        assert {split: len(tasks.tasks(split)) for split in tasks.splits} == {"train": 64, "test": 16}
        assert tasks.actions == TextAction("guess")
        assert_conforms(tasks, actions=["4", "16", "24", "nine"])


def test_the_environment_that_openenv_ships_conforms(python: Path, tmp_path: Path) -> None:
    """It lists no tasks, so its resets come from the recipe. `openenv init` writes it out: it echoes messages."""
    init = [python, "-m", "openenv.cli", "init", "echo_env", "--output-dir", tmp_path]
    subprocess.run([*map(str, init)], check=True, capture_output=True)
    port = free_port()
    command = [python, "-m", "server.app", "--port", str(port)]
    with program(command, port, tmp_path / "echo_env") as url:
        with pytest.raises(UserError, match="lists no tasks of 'echo_env': give seeds"):
            _ = OpenEnv(url=url).splits
        splits = {"train": {"seeds": "0-9"}, "test": {"seeds": "100-104"}}
        assert_conforms(OpenEnv(url=url, splits=splits, max_turns=4), actions=["hello", "a longer message"])


STRUCTURED = """
import sys
from typing import Any, Literal
import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

class Move(Action):
    direction: Literal["left", "right"]
    steps: int = 1

class Place(Observation):
    position: int = 0
    goal: int = 3

class Walk(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True
    state = State()
    def reset(self, seed=None, episode_id=None, **_: Any):
        self.position = 0
        return Place(position=0)
    def step(self, action: Move, timeout_s=None, **_: Any):
        if action.steps > 9:
            raise RuntimeError("out of the world")
        self.position += action.steps if action.direction == "right" else -action.steps
        return Place(position=self.position, done=self.position == 3, reward=5.0 * (self.position == 3))

app = create_app(Walk, Move, Place, env_name="walk", max_concurrent_envs=2)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


def test_structured_actions(python: Path, tmp_path: Path) -> None:
    """The server's validation errors are for the agent; its exceptions and its capacity are infrastructure."""
    (tmp_path / "walk.py").write_text(STRUCTURED)
    port = free_port()
    with program([python, "walk.py", str(port)], port, tmp_path) as url:
        splits = {"train": {"seeds": "0-3"}, "test": {"seeds": "4-5"}}
        tasks = OpenEnv(url=url, splits=splits, full_reward=5.0, max_turns=5)
        assert isinstance(tasks.actions, JsonAction)
        assert_conforms(tasks, actions=['{"direction": "right"}', '{"direction": "left", "steps": 2}'])
        asyncio.run(_walk(tasks))


async def _walk(tasks: OpenEnv) -> None:
    task = tasks.tasks("train")[0]
    one, two, three = (tasks.make() for _ in range(3))
    [prompt] = await one.reset(task, 0)
    assert '"enum": ["left", "right"]' in prompt.content
    assert json.loads(prompt.content.splitlines()[-1])["position"] == 0
    step = await one.step('I go {"direction": "up"}.')
    assert step.observation == "Invalid action: direction: Input should be 'left' or 'right'"
    step = await one.step('{"direction": "right", "steps": 2}')
    assert (json.loads(step.observation)["position"], step.reward, step.done) == (2, 0.0, False)
    step = await one.step('{"direction": "right"}')
    assert (step.reward, step.success, step.info["reward"]) == (1.0, True, 5.0)
    await two.reset(task, 0)
    with pytest.raises(SessionError, match=r"at capacity: 2/2 .*CAPACITY_REACHED: set rollout.concurrency"):
        await three.reset(task, 0)
    with pytest.raises(SessionError, match=r"failed at 'step': out of the world \(EXECUTION_ERROR"):
        await two.step('{"direction": "right", "steps": 10}')
    await two.close()
    await three.reset(task, 0)  # closing frees the place at once
    await one.close()
    await three.close()


MCP = """
import sys
import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Observation, State

class Safe(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True
    state = State()
    def __init__(self):
        server = FastMCP("safe")
        self.tries = 0
        @server.tool
        def turn(digit: int, left: bool = False) -> str:
            'Turns the dial.'
            self.tries += 1
            return "It opens." if digit == self.digit else "It stays shut."
        @server.tool
        def kick(how: str) -> dict:
            raise RuntimeError(f"you kick it {how} and hurt your foot")
        super().__init__(server)
    def reset(self, seed=None, episode_id=None, **_):
        self.digit, self.tries = (seed or 0) % 10, 0
        return Observation(metadata={})
    async def step_async(self, action, timeout_s=None, **more):
        found = await super().step_async(action, timeout_s=timeout_s, **more)
        opened = "It opens." in str(getattr(found, "result", ""))
        found.done, found.reward = opened or self.tries >= 5, float(opened)
        return found
    def _step_impl(self, action, timeout_s=None, **_):
        return Observation()

app = create_app(Safe, CallToolAction, CallToolObservation, env_name="safe", max_concurrent_envs=4)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


def _calls(*calls: tuple[str, dict[str, object]]) -> str:
    return write_action("", [{"name": name, "arguments": arguments} for name, arguments in calls])


def test_an_environment_of_tools(python: Path, tmp_path: Path) -> None:
    (tmp_path / "safe.py").write_text(MCP)
    port = free_port()
    with program([python, "safe.py", str(port)], port, tmp_path) as url:
        splits = {"train": {"seeds": "0-9"}, "test": {"seeds": "20-23"}}
        tasks = OpenEnv(url=url, splits=splits, max_turns=8, instructions="Open the safe.")
        tasks.check_machine()
        turn, kick = tasks.tools
        assert (turn.name, turn.description, kick.name) == ("turn", "Turns the dial.", "kick")
        assert turn.parameters["properties"]["digit"]["type"] == "integer"
        assert turn.parameters["required"] == ["digit"]
        assert_conforms(tasks, actions=[_calls(("turn", {"digit": digit})) for digit in range(3)])
        asyncio.run(_open(tasks))


async def _open(tasks: OpenEnv) -> None:
    environment = tasks.make()
    [prompt] = await environment.reset(tasks.tasks("train")[3], 0)
    assert prompt.content.startswith("Open the safe.")
    step = await environment.step(_calls(("kick", {"how": "hard"})))
    assert "hurt your foot" in step.observation
    assert step.observation.startswith("Error: ")
    step = await environment.step(_calls(("turn", {"digit": "three"})))
    assert step.observation.startswith("Error: ")
    assert "digit" in step.observation
    step = await environment.step(_calls(("turn", {})))
    assert step.observation == "Invalid action: the call of turn lacks these arguments: digit"
    step = await environment.step(_calls(("turn", {"digit": 1}), ("turn", {"digit": 2})))
    assert (step.observation, step.reward, step.done) == ("It stays shut.\n\nIt stays shut.", 0.0, False)
    # The calls after the one that ends the episode are not made.
    step = await environment.step(_calls(("turn", {"digit": 3}), ("turn", {"digit": 4})))
    assert (step.observation, step.reward, step.success) == ("It opens.", 1.0, True)
    await environment.close()


# -- their client, our server ---------------------------------------------------------------------------------------

PLAY = """
import json, sys
from openenv.core import GenericEnvClient
seen = []
with GenericEnvClient(base_url=sys.argv[1]).sync() as client:
    result = client.reset(split="test", index=3, seed=5)
    seen.append(result.observation["text"])
    for action in sys.argv[2].split():
        result = client.step({"action": action})
        seen.append([result.observation["text"], result.reward, result.done, result.observation["success"]])
    state = client.state()
    try:
        client.step({"act": "Up"})
    except RuntimeError as error:
        refused = str(error)
print(json.dumps({"seen": seen, "state": state, "refused": refused}))
"""


def test_their_client_plays_on_our_server(python: Path, tmp_path: Path) -> None:
    """Word for word what the environment itself says, with its rewards."""
    sokoban = Sokoban()
    task = sokoban.tasks("test")[3]
    plan = (sokoban.oracle(task) or "").split()

    async def here() -> list[object]:
        environment = sokoban.make()
        prompt = await environment.reset(task, 5)
        steps = [await environment.step(action) for action in plan]
        text = "\n\n".join(message.content for message in prompt)
        return [text, *([step.observation, step.reward, step.done, step.success] for step in steps)]

    port = free_port()
    command = [sys.executable, "-m", "skillsd", "envs", "serve", "sokoban", "--port", str(port)]
    with program(command, port, tmp_path) as url:
        ended = subprocess.run(
            [str(python), "-I", "-c", textwrap.dedent(PLAY), url, " ".join(plan)],
            capture_output=True, text=True, timeout=200, env={**os.environ, "NO_PROXY": "*"},
        )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["seen"] == asyncio.run(here())
    assert found["seen"][-1][1:] == [1.0, True, True]
    assert found["state"] == {"episode_id": None, "step_count": len(plan), "task_id": task.id}
    assert "VALIDATION_ERROR" in found["refused"]
