"""A task set as an OpenEnv server: `skillsd envs serve`. Clients of OpenEnv, such as TRL's users, play on it.

An ASGI application: the Task API and the schemas over HTTP, episodes over a WebSocket (one session each).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from skillsd import __version__
from skillsd.envs.base import Step, TaskSet
from skillsd.envs.checked import CheckedEnvironment, checked
from skillsd.errors import UserError, unknown_name
from skillsd.seeds import derive_seed
from skillsd.types import TRAIN_SPLIT, Message, Task

LEAST_SECONDS = 60.0
"""Deadline of a call to the environment, if its own deadlines don't need more."""

_METADATA = {"type": "object", "description": "about the message; not used"}
SCHEMAS = {
    "action": {
        "title": "TextAction",
        "type": "object",
        "properties": {
            "action": {"type": "string", "description": "what the agent writes in a turn"},
            "metadata": _METADATA,
        },
        "required": ["action"],
        "additionalProperties": False,
    },
    "observation": {
        "title": "TextObservation",
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "what the agent reads"},
            "messages": {"type": "array", "description": "after a reset: the text as messages with role and content"},
            "success": {"type": "boolean", "description": "whether the whole task is done"},
            "done": {"type": "boolean"},
            "reward": {"type": ["number", "null"], "description": "how much of the task is done so far, from 0 to 1"},
            "metadata": _METADATA,
        },
    },
    "state": {
        "title": "State",
        "type": "object",
        "properties": {
            "episode_id": {"type": ["string", "null"]},
            "step_count": {"type": "integer"},
            "task_id": {"type": ["string", "null"]},
        },
    },
}


class InvalidMessageError(Exception):
    """A client's message does not fit: it gets the error, and the session goes on."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(text)


class Server:
    """Serves the tasks of a task set.

    Args:
        splits: the splits to serve; default: all.
        sessions: maximum number of sessions at a time. Another one is refused.

    Raises:
        UserError: for an unknown split, and for an environment with tools.
    """

    def __init__(self, task_set: TaskSet, splits: Sequence[str] | None = None, sessions: int = 256) -> None:
        self.task_set, self.sessions, self.active = checked(task_set), sessions, 0
        if self.task_set.tools:
            raise UserError(f"the environment {self.task_set.name!r} has tools, which can't be served yet")
        for split in splits or ():
            if split not in self.task_set.splits:
                raise unknown_name(f"split of {self.task_set.name!r}", split, self.task_set.splits)
        self.splits = {split: list(self.task_set.tasks(split)) for split in splits or self.task_set.splits}
        self.seconds = max(LEAST_SECONDS, 2 * self.task_set.slowest_call)

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/health", lambda request: JSONResponse({"status": "healthy"})),
                Route("/schema", lambda request: JSONResponse(SCHEMAS)),
                Route("/metadata", self._metadata),
                Route("/list_environments", lambda request: JSONResponse([self.task_set.name])),
                Route("/{env}/splits", self._splits),
                Route("/{env}/{what}", self._tasks, methods=["POST"]),
                WebSocketRoute("/ws", self._play),
            ],
            exception_handlers={HTTPException: _failure},
        )

    def tasks(self, split: object) -> list[Task]:
        """The tasks of a split that is served.

        Raises:
            UserError: for any other one.
        """
        if not isinstance(split, str) or split not in self.splits:
            raise unknown_name(f"split of {self.task_set.name!r}", str(split), self.splits)
        return self.splits[split]

    # -- HTTP ---------------------------------------------------------------------------------------------------

    def _metadata(self, request: Request) -> Response:
        kind = type(self.task_set.inner)
        about = (kind.__doc__ or kind.__name__).strip().splitlines()[0]
        return JSONResponse({"name": self.task_set.name, "description": about, "version": __version__})

    def _splits(self, request: Request) -> Response:
        self._check_name(request)
        kinds = {TRAIN_SPLIT: "train", "test": "test"}
        return JSONResponse([{"name": name, "type": kinds.get(name, "validation")} for name in self.splits])

    async def _tasks(self, request: Request) -> Response:
        """The four POST routes of the Task API."""
        self._check_name(request)
        try:
            given = json.loads(await request.body())
            tasks = [_described(index, task) for index, task in enumerate(self.tasks(given["split"]))]
            match request.path_params["what"]:
                case "tasks":
                    return JSONResponse({"tasks": tasks, "env_name": self.task_set.name})
                case "num_tasks":
                    return JSONResponse({"num_tasks": len(tasks)})
                case "task":
                    return JSONResponse({"task": tasks[range(len(tasks))[given["index"]]]})
                case "task_range":
                    return JSONResponse({"tasks": tasks[slice(given.get("start"), given.get("stop"))]})
        except IndexError:
            raise HTTPException(400, "Invalid task index") from None
        except (UserError, ValueError, KeyError, TypeError) as error:
            raise HTTPException(400, f"expected JSON with a split that is served: {error}") from None
        raise HTTPException(404)

    def _check_name(self, request: Request) -> None:
        if request.path_params["env"].lower() != self.task_set.name.lower():
            raise HTTPException(404, f"the environment here is {self.task_set.name!r}")

    # -- WebSocket ----------------------------------------------------------------------------------------------

    async def _play(self, socket: WebSocket) -> None:
        if "origin" in socket.headers:  # a page in a browser, which may be anybody's
            await socket.close(1008)
            return
        await socket.accept()
        if self.active >= self.sessions:
            text = f"the server is at capacity: {self.active} of {self.sessions} sessions are active"
            await socket.send_text(_error("CAPACITY_REACHED", text))
            await socket.close()
            return
        self.active += 1
        episode = Episode(self)
        try:
            while (answer := await episode.answer(await _receive(socket))) is not None:
                await socket.send_text(answer)
        except WebSocketDisconnect:
            pass
        finally:
            await episode.close()
            self.active -= 1
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the client is gone
                await socket.close()


class Episode:
    """A session: episodes one after another."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._environment: CheckedEnvironment | None = None
        self._task: Task | None = None
        self._id: str | None = None
        self._turns, self._over = 0, True

    async def answer(self, text: str) -> str | None:
        """The answer to a message; None if the client ends the session."""
        try:
            kind, data = _parsed(text)
            match kind:
                case "reset":
                    return _observation(await self._reset(data))
                case "step":
                    return _observation(await self._step(data))
                case "state":
                    task_id = self._task.id if self._task else None
                    state = {"episode_id": self._id, "step_count": self._turns, "task_id": task_id}
                    return json.dumps({"type": "state", "data": state})
                case "close":
                    return None
            raise InvalidMessageError("UNKNOWN_TYPE", f"unknown type of message: {kind!r}")
        except InvalidMessageError as error:
            return _error(error.code, str(error))
        except TimeoutError:
            self._over = True
            return _error("EXECUTION_ERROR", f"the environment took longer than {self._server.seconds:g} s")
        except UserError as error:
            self._over = True
            return _error("EXECUTION_ERROR", str(error))

    async def close(self) -> None:
        """Close the environment. A fault of it is nobody's concern any more."""
        environment, self._environment = self._environment, None
        if environment is not None:
            with contextlib.suppress(UserError, TimeoutError):
                async with asyncio.timeout(self._server.seconds):
                    await environment.close()

    async def _reset(self, data: Mapping[str, Any]) -> dict[str, Any]:
        task, seed = self._chosen(data)
        await self.close()  # an environment whose last call failed is not used again
        self._environment = self._server.task_set.make()
        async with asyncio.timeout(self._server.seconds):
            prompt = await self._environment.reset(task, seed)
        episode = data.get("episode_id")
        self._task, self._turns, self._over, self._id = task, 0, False, None if episode is None else str(episode)
        return _data(prompt)

    def _chosen(self, data: Mapping[str, Any]) -> tuple[Task, int]:
        """The task and the seed of a reset: by split and index, or drawn by the seed."""
        seed, split, index = data.get("seed"), data.get("split"), data.get("index")
        if seed is None:
            seed = random.randrange(2**31)
        if not _is_number(seed) or seed < 0:
            raise InvalidMessageError("VALIDATION_ERROR", f"seed is {seed!r}: expected a whole number, 0 or more")
        try:
            tasks = self._server.tasks(next(iter(self._server.splits)) if split is None else split)
        except UserError as error:
            raise InvalidMessageError("VALIDATION_ERROR", str(error)) from None
        if index is None:
            index = derive_seed("serve", seed) % len(tasks)
        if not _is_number(index) or not 0 <= index < len(tasks):
            raise InvalidMessageError("VALIDATION_ERROR", f"index is {index!r}: expected 0 to {len(tasks) - 1}")
        return tasks[index], seed

    async def _step(self, data: Mapping[str, Any]) -> dict[str, Any]:
        action = data.get("action")
        if not isinstance(action, str) or data.keys() - {"action", "metadata"}:
            raise InvalidMessageError("VALIDATION_ERROR", "expected the text of the action: {'action': '...'}")
        if self._environment is None or self._over:
            raise InvalidMessageError("EXECUTION_ERROR", "there is no episode: reset first")
        async with asyncio.timeout(self._server.seconds):
            step = await self._environment.step(action)
        self._turns += 1
        self._over = step.done or self._turns >= self._server.task_set.max_turns
        return _data(step) | {"done": self._over}


async def _receive(socket: WebSocket) -> str:
    message = await socket.receive()
    if message["type"] != "websocket.receive":
        raise WebSocketDisconnect
    return message.get("text") or bytes(message.get("bytes") or b"").decode("utf-8", "replace")


def _parsed(text: str) -> tuple[str, Mapping[str, Any]]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidMessageError("INVALID_JSON", f"the message is no JSON: {error}") from None
    data = message.get("data", {}) if isinstance(message, dict) else None
    if not isinstance(data, dict):
        raise InvalidMessageError("VALIDATION_ERROR", "expected {'type': '...', 'data': {...}}")
    return str(message.get("type")), data


def _described(index: int, task: Task) -> dict[str, Any]:
    """What clients learn of a task. Its payload stays here: it may hold the solution."""
    return {"id": task.id, "index": index, "split": task.split, "difficulty": task.difficulty}


def _data(found: Step | tuple[Message, ...]) -> dict[str, Any]:
    """The data of an answer."""
    observation: dict[str, Any] = {"metadata": {}}
    if isinstance(found, Step):
        observation |= {"text": found.observation, "success": found.success}
        return {"observation": observation, "reward": found.reward, "done": found.done}
    messages = [{"role": message.role, "content": message.content} for message in found]
    observation |= {"text": "\n\n".join(message.content for message in found), "messages": messages, "success": False}
    return {"observation": observation, "reward": None, "done": False}


def _observation(data: Mapping[str, Any]) -> str:
    return json.dumps({"type": "observation", "data": data})


def _error(code: str, text: str) -> str:
    errors = [{"loc": [], "msg": text}] if code == "VALIDATION_ERROR" else []
    return json.dumps({"type": "error", "data": {"message": text, "code": code, "errors": errors}})


def _failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
