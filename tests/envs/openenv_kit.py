"""OpenEnv servers for tests: ours or a scripted one in a thread, and any program in a process."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from skillsd.envs.openenv.server import SCHEMAS


@contextlib.contextmanager
def running(app: Starlette, **options: Any) -> Iterator[str]:
    """Serve an ASGI application on a free port; yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        options = {"ws_ping_interval": None, "log_level": "critical", "lifespan": "off", **options}
        config = uvicorn.Config(app, ws="websockets-sansio", timeout_graceful_shutdown=1, **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@contextlib.contextmanager
def program(command: Sequence[str | Path], port: int, cwd: Path, seconds: float = 200) -> Iterator[str]:
    """Run a program that serves at `port`; yields the URL once it answers."""
    log = cwd / f"server-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, cwd=cwd)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + seconds
        while not _answers(f"{url}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, f"no answer in {seconds} s: {log.read_text()}"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def observation(reward: Any = None, done: Any = False, **fields: Any) -> dict[str, Any]:
    """The server's answer to a reset or a step."""
    return {"type": "observation", "data": {"observation": fields, "reward": reward, "done": done}}


def error(code: str, text: str = "no luck", **more: Any) -> dict[str, Any]:
    return {"type": "error", "data": {"message": text, "code": code, **more}}


class Scripted:
    """A server whose answers a function makes.

    Args:
        answer: from the kind and the data of a message to the answer: JSON, text that is sent as it is, an awaitable of
            either, or an exception that is raised in the server, so that the connection breaks.
        schema: replaces the schemas.
        routes: path -> what a GET answers; POST routes have the path ``POST /...``.
    """

    def __init__(
        self,
        answer: Callable[[str, dict[str, Any]], Any],
        schema: dict[str, Any] | None = None,
        routes: dict[str, Any] | None = None,
    ) -> None:
        self._answer = answer
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.active = 0
        found = {"/schema": SCHEMAS if schema is None else schema, "/list_environments": ["scripted"], **(routes or {})}
        self.app = Starlette(routes=[*map(_route, found, found.values()), WebSocketRoute("/ws", self._play)])

    async def _play(self, connection: WebSocket) -> None:
        await connection.accept()
        self.active += 1
        try:
            while (message := await connection.receive())["type"] == "websocket.receive":
                given = json.loads(message["text"])
                if given["type"] == "close":
                    break
                self.received.append((given["type"], given["data"]))
                answer = self._answer(given["type"], given["data"])
                answer = await answer if hasattr(answer, "__await__") else answer
                if isinstance(answer, Exception):
                    raise answer
                await connection.send_text(answer if isinstance(answer, str) else json.dumps(answer))
            with contextlib.suppress(RuntimeError):
                await connection.close()
        finally:
            self.active -= 1


def _route(path: str, answer: Any) -> Route:
    method, _, place = path.rpartition(" ")

    async def respond(request: Any) -> Any:
        if isinstance(answer, Response):
            return answer
        return JSONResponse(answer(json.loads(await request.body())) if callable(answer) else answer)

    return Route(place, respond, methods=[method or "GET"])
