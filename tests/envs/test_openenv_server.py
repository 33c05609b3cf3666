"""Our OpenEnv server: its protocol, what it gives away, and what happens when clients or environments misbehave."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("websockets", reason="needs skillsd[openenv]")
pytest.importorskip("uvicorn", reason="needs skillsd[serve]")

from openenv_kit import running
from toy_env import Toy
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from skillsd.cli import envs as commands
from skillsd.envs import registry
from skillsd.envs.openenv import server as served
from skillsd.envs.openenv import serving
from skillsd.envs.openenv.server import Server
from skillsd.envs.sokoban import Sokoban
from skillsd.errors import UserError

Play = Callable[[ClientConnection], Awaitable[None]]


def play(url: str, *episodes: Play, headers: dict[str, str] | None = None) -> None:
    """Run functions of a connection at the same time, each with its own."""

    async def one(episode: Play) -> None:
        address = url.replace("http", "ws") + "/ws"
        async with connect(address, proxy=None, additional_headers=headers) as connection:
            await episode(connection)

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, episodes))

    asyncio.run(all_of_them())


async def ask(connection: ClientConnection, kind: Any, data: Any = None) -> dict[str, Any]:
    """The answer to a message."""
    await connection.send(json.dumps({"type": kind, "data": {} if data is None else data}))
    answer: dict[str, Any] = json.loads(await connection.recv())
    return answer


async def code_of(connection: ClientConnection, kind: Any, data: Any = None) -> str:
    answer = await ask(connection, kind, data)
    assert answer["type"] == "error", answer
    return str(answer["data"]["code"])


def http(url: str, data: Any = None) -> tuple[int, Any]:
    """Status and JSON of a GET, or of a POST of `data`."""
    body = None if data is None else data if isinstance(data, bytes) else json.dumps(data).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, body), timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# -- HTTP -----------------------------------------------------------------------------------------------------------


def test_the_task_api() -> None:
    sokoban = Sokoban()
    with running(Server(sokoban, splits=["train", "test"]).app()) as url:
        assert http(f"{url}/health") == (200, {"status": "healthy"})
        assert http(f"{url}/list_environments") == (200, ["sokoban"])
        assert http(f"{url}/metadata")[1]["description"] == "Sokoban: push every box onto a target."
        found = [{"name": "train", "type": "train"}, {"name": "test", "type": "test"}]
        assert http(f"{url}/Sokoban/splits") == (200, found)
        api = f"{url}/sokoban"
        assert http(f"{api}/num_tasks", {"split": "test"}) == (200, {"num_tasks": 512})
        tasks = http(f"{api}/tasks", {"split": "test"})[1]["tasks"]
        assert [task["id"] for task in tasks] == [task.id for task in sokoban.tasks("test")]
        assert http(f"{api}/task", {"split": "test", "index": 7}) == (200, {"task": tasks[7]})
        assert http(f"{api}/task_range", {"split": "test", "start": 5, "stop": 7}) == (200, {"tasks": tasks[5:7]})
        assert set(http(f"{url}/schema")[1]) == {"action", "observation", "state"}


def test_mistakes_over_http() -> None:
    with running(Server(Sokoban()).app()) as url:
        api = f"{url}/sokoban"
        assert http(f"{url}/chess/splits")[0] == 404
        assert http(f"{url}/chess/tasks", {"split": "test"})[0] == 404
        assert http(f"{api}/nothing", {"split": "test"})[0] == 404
        for index in (512, -513, "x"):
            assert http(f"{api}/task", {"split": "test", "index": index})[0] == 400
        for data in ({"split": "tset"}, {}, [], b"no JSON", {"split": ["test"]}, b""):
            status, text = http(f"{api}/tasks", data)
            assert (status, "expected JSON with a split" in text) == (400, True), data


def test_held_out_splits_can_be_left_out() -> None:
    """They are neither listed nor played."""

    async def episode(connection: ClientConnection) -> None:
        answer = await ask(connection, "reset", {"split": "test", "index": 0})
        assert answer["data"]["code"] == "VALIDATION_ERROR"
        assert answer["data"]["message"] == "unknown split of 'sokoban' 'test'. Known: train"
        assert (await ask(connection, "reset", {"index": 0}))["type"] == "observation"

    with running(Server(Sokoban(), splits=["train"]).app()) as url:
        assert http(f"{url}/sokoban/splits")[1] == [{"name": "train", "type": "train"}]
        assert http(f"{url}/sokoban/tasks", {"split": "test"})[0] == 400
        play(url, episode)
    with pytest.raises(UserError, match=r"unknown split of 'sokoban' 'tset'. Did you mean 'test'"):
        Server(Sokoban(), splits=["tset"])


def test_what_the_environment_knows_stays_there() -> None:
    """No payload, no info: they may hold the solution."""
    toy = Toy()
    texts = []

    async def episode(connection: ClientConnection) -> None:
        texts.append(await ask(connection, "reset", {"split": "test", "index": 0}))
        texts.append(await ask(connection, "step", {"action": "Left"}))
        texts.append(await ask(connection, "state"))

    with running(Server(toy).app()) as url:
        texts.append(http(f"{url}/toy/tasks", {"split": "test"})[1])
        play(url, episode)
    for secret in ("target", "loses", "turn"):
        assert secret not in json.dumps(texts)


# -- episodes -------------------------------------------------------------------------------------------------------


def test_an_episode_ends_after_the_last_turn() -> None:
    async def episode(connection: ClientConnection) -> None:
        first = (await ask(connection, "reset", {"split": "train", "index": 0, "seed": 1, "episode_id": "e"}))["data"]
        assert (first["reward"], first["done"]) == (None, False)
        assert first["observation"]["messages"] == [{"role": "user", "content": first["observation"]["text"]}]
        steps = [(await ask(connection, "step", {"action": "Right"}))["data"] for _ in range(2)]
        assert [(step["done"], step["reward"]) for step in steps] == [(False, 0.5), (True, 0.5)]
        assert await code_of(connection, "step", {"action": "Right"}) == "EXECUTION_ERROR"
        state = await ask(connection, "state")
        assert state["data"] == {"episode_id": "e", "step_count": 2, "task_id": "train-0"}

    with running(Server(Toy(turns=2)).app()) as url:
        play(url, episode)


def test_the_seed_chooses_a_task_if_none_is_named() -> None:
    async def episode(connection: ClientConnection) -> None:
        found = []
        for seed in (1, 1, 2, 3, 4, 5):
            await ask(connection, "reset", {"seed": seed, "difficulty": "what other servers call an option"})
            found.append((await ask(connection, "state"))["data"]["task_id"])
        assert found[0] == found[1]
        assert len(set(found)) > 1
        assert all(task.startswith("train-") for task in found)
        assert (await ask(connection, "reset"))["type"] == "observation"

    with running(Server(Toy()).app()) as url:
        play(url, episode)


def test_a_clients_mistakes_are_answered_and_the_session_goes_on() -> None:
    async def episode(connection: ClientConnection) -> None:
        for text in ("no JSON", "[" * 100_000, b"\xff"):
            await connection.send(text)
            assert json.loads(await connection.recv())["data"]["code"] == "INVALID_JSON"
        for message in ("3", '{"type": "reset", "data": 3}', "null"):
            await connection.send(message)
            assert json.loads(await connection.recv())["data"]["code"] == "VALIDATION_ERROR"
        assert await code_of(connection, "mcp") == "UNKNOWN_TYPE"
        assert await code_of(connection, ["reset"]) == "UNKNOWN_TYPE"
        assert await code_of(connection, "step", {"action": "Up"}) == "EXECUTION_ERROR"
        for data in ({"seed": -1}, {"seed": "1"}, {"seed": True}, {"index": 7}, {"index": -1}, {"split": 3}):
            assert await code_of(connection, "reset", data) == "VALIDATION_ERROR"
        assert (await ask(connection, "reset", {"index": 0}))["type"] == "observation"
        for data in ({}, {"action": 3}, {"action": "Up", "acton": "Up"}):
            assert await code_of(connection, "step", data) == "VALIDATION_ERROR"
        assert (await ask(connection, "step", {"action": "Right", "metadata": {}}))["data"]["reward"] == 0.5

    with running(Server(Toy()).app()) as url:
        play(url, episode)


def test_a_full_server_says_so() -> None:
    entered, done = asyncio.Event(), asyncio.Event()

    async def first(connection: ClientConnection) -> None:
        await ask(connection, "reset")
        entered.set()
        await done.wait()

    async def second(connection: ClientConnection) -> None:
        await entered.wait()
        async with connect(
            f"ws://{connection.remote_address[0]}:{connection.remote_address[1]}/ws", proxy=None
        ) as third:
            assert json.loads(await third.recv())["data"]["code"] == "CAPACITY_REACHED"
            with pytest.raises(ConnectionClosed):
                await third.recv()
        done.set()

    server = Server(Toy(), sessions=2)
    with running(server.app()) as url:
        play(url, first, second)
        play(url, first)  # there is room again
    assert server.active == 0


def test_every_way_to_end_a_session_closes_the_environment() -> None:
    toy = Toy()

    async def leaves(connection: ClientConnection) -> None:
        await ask(connection, "reset")
        await connection.send(json.dumps({"type": "close"}))
        with pytest.raises(ConnectionClosed):
            await connection.recv()

    async def hangs_up(connection: ClientConnection) -> None:
        await ask(connection, "reset")

    async def breaks(connection: ClientConnection) -> None:
        await ask(connection, "reset")
        connection.transport.abort()

    server = Server(toy)
    with running(server.app()) as url:
        play(url, leaves, hangs_up, breaks)
    assert server.active == 0
    assert [environment.closed for environment in toy.made] == [1, 1, 1]


def test_a_page_in_a_browser_is_refused() -> None:
    """Any page that is open on this machine could otherwise play, in AppWorld with code."""

    async def nothing(connection: ClientConnection) -> None:
        raise AssertionError("connected")

    with running(Server(Toy()).app()) as url, pytest.raises(InvalidStatus, match="403"):
        play(url, nothing, headers={"Origin": "https://example.org"})


# -- environments that misbehave ------------------------------------------------------------------------------------


def test_a_failing_environment_is_an_error_until_the_next_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    faults = {"step": iter([RuntimeError("no luck"), None]), "reset": iter([None, OSError("no disk"), None])}

    def fault(call: str, environment: Any) -> None:
        error = next(faults.get(call, iter([None])))
        if error is not None:
            raise error

    async def episode(connection: ClientConnection) -> None:
        await ask(connection, "reset")
        answer = await ask(connection, "step", {"action": "Right"})
        assert answer["data"]["code"] == "EXECUTION_ERROR"
        assert "no luck" in answer["data"]["message"]
        assert "reset first" in (await ask(connection, "step", {"action": "Right"}))["data"]["message"]
        assert "no disk" in (await ask(connection, "reset"))["data"]["message"]
        assert "reset first" in (await ask(connection, "step", {"action": "Right"}))["data"]["message"]
        await ask(connection, "reset")
        assert (await ask(connection, "step", {"action": "Right"}))["type"] == "observation"

    toy.faults = fault
    with running(Server(toy).app()) as url:
        play(url, episode)


def test_a_hanging_environment_is_an_error_and_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "LEAST_SECONDS", 0.5)
    toy = Toy()

    def fault(call: str, environment: Any) -> Any:
        hangs = call == "step" and environment.task.id == "train-1"
        return asyncio.sleep(60) if hangs else None

    async def hanging(connection: ClientConnection) -> None:
        await ask(connection, "reset", {"index": 1})
        answer = await ask(connection, "step", {"action": "Right"})
        assert answer["data"]["message"] == "the environment took longer than 0.5 s"

    async def other(connection: ClientConnection) -> None:
        for _ in range(20):
            await ask(connection, "reset", {"index": 0})
            assert (await ask(connection, "step", {"action": "Right"}))["type"] == "observation"

    toy.faults = fault
    with running(Server(toy).app()) as url:
        play(url, hanging, other)
    assert all(environment.closed for environment in toy.made)


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "skillsd", "envs", "serve", "sokoban", "--port", "0", "--splits", "train"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline().strip() for _ in range(3)]
        assert lines[0] == "sokoban (train 96), at most 256 sessions at a time"
        assert lines[1].endswith("; Ctrl-C ends it")
        assert lines[2] == "only this machine can connect; for others: --host 0.0.0.0"
        url = lines[1].split()[3].rstrip(";")
        assert http(f"{url}/sokoban/splits") == (200, [{"name": "train", "type": "train"}])
        assert registry.load("openenv", {"url": url}).splits == ("train",)
    finally:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "stopped\n"


def test_it_says_who_can_connect() -> None:
    assert serving._reach("0.0.0.0").startswith("every machine that reaches this one can connect")
    assert serving._reach("192.168.0.3").startswith("every machine")
    assert serving._reach("::1").startswith("only this machine")
    assert serving._reach("127.0.0.1").startswith("only this machine")


def test_an_address_that_can_not_be_used_is_one_line() -> None:
    with serving._listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for host, number in (("127.0.0.1", port), ("no such host", 80), ("192.0.2.1", 80)):
            with pytest.raises(UserError, match=rf"^can't listen on {host}, port {number}: .*--host and --port$"):
                commands.envs_serve("sokoban", [], port=number, host=host, splits=None, sessions=1)


def test_a_machine_that_can_not_play_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_machine(self: Any) -> None:
        raise UserError("no engine here")

    monkeypatch.setattr(Sokoban, "check_machine", check_machine)
    with pytest.raises(UserError, match=r"^no engine here$"):
        commands.envs_serve("sokoban", [], port=0, host="127.0.0.1", splits=None, sessions=1)
