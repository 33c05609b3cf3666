"""One session with an OpenEnv server: a WebSocket, an episode.

All sockets live in an event loop of their own, in a thread. Servers close connections that don't answer their pings
(uvicorn: within 20 s), and the caller's event loop also runs the model, which may block it for longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import threading
from collections.abc import Coroutine, Mapping
from types import ModuleType
from typing import Any, TypeVar

from skillsd.envs import values
from skillsd.envs.openenv.api import is_local
from skillsd.errors import UserError

T = TypeVar("T")

MAX_MESSAGE_BYTES = 16 << 20
"""Longest answer that is read."""

CLOSE_SECONDS = 5.0
"""Time for the server to end the session. It is then free for another one."""


class SessionError(Exception):
    """An infrastructure failure: the session can't be used any more."""


class RefusedActionError(Exception):
    """The server says that the action is invalid; the message is for the agent. The session goes on."""


class Session:
    """An open session. Create it with `Session.open`."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._usable = True

    @classmethod
    async def open(cls, url: str) -> Session:
        """Connect to the server.

        Args:
            url: of the socket, e.g. ``ws://127.0.0.1:8000/ws``.

        Raises:
            SessionError: if that fails.
            UserError: if `websockets` is not installed.
        """
        library = websockets()

        async def connect() -> Any:
            proxy = {"proxy": None} if is_local(url) else {}
            # No pings of our own: rollout.step_seconds limits each call, and a busy server may answer late.
            # No compression: messages are short.
            options = {"max_size": MAX_MESSAGE_BYTES, "ping_interval": None, "compression": None, **proxy}
            return await library.connect(url, **options)

        try:
            return cls(await _in_the_loop(connect()))
        except (OSError, TimeoutError, library.WebSocketException) as error:
            raise SessionError(f"can't connect to {url}: {error}") from error

    async def ask(self, kind: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Send a message and return the data of the answer.

        Raises:
            RefusedActionError: if the server says that the data are invalid.
            SessionError: for any other error of the server, and if the connection is lost.
        """
        usable, self._usable = self._usable, False  # so it stays, if this call is cancelled or the connection is lost
        if not usable:
            raise SessionError("the session was lost before")
        answer = await self._exchange(kind, json.dumps({"type": kind, "data": data}))
        self._usable = True
        return _data_of(kind, answer)

    async def _exchange(self, kind: str, message: str) -> str | bytes:
        closed = websockets().ConnectionClosed

        async def exchange() -> str | bytes:
            with contextlib.suppress(closed):  # the server may say why it closed
                await self._socket.send(message)
            return await self._socket.recv()

        try:
            return await _in_the_loop(exchange())
        except closed as error:
            raise SessionError(f"the server closed the connection during {kind!r}: {error}") from error

    async def close(self) -> None:
        """End the session, and wait until the server has ended it, so that it has room for another one. Idempotent."""
        closed = websockets().ConnectionClosed

        async def leave() -> None:
            try:
                async with asyncio.timeout(CLOSE_SECONDS if self._usable else 0):
                    await self._socket.send(json.dumps({"type": "close"}))
                    while True:
                        await self._socket.recv()
            except (closed, TimeoutError):
                pass
            finally:
                self._socket.transport.abort()

        await _in_the_loop(leave())


def websockets() -> ModuleType:
    """The library.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import websockets.asyncio.client
        import websockets.exceptions  # names that the package would load lazily
    except ImportError as error:
        raise UserError(f"OpenEnv servers need {error.name}: pip install 'skillsd[openenv]'") from error
    return websockets


def _data_of(kind: str, answer: str | bytes) -> Mapping[str, Any]:
    """The data of an answer; raises as `Session.ask`."""
    try:
        message = values.valid_unicode(json.loads(answer))
    except (ValueError, RecursionError):
        message = None
    data = message.get("data") if isinstance(message, dict) else None
    if not isinstance(data, dict) or message.get("type") not in ("observation", "error"):
        raise SessionError(f"the server sent a malformed answer to {kind!r}: {answer[:80]!r}")
    if message["type"] == "observation":
        return data
    code, text = data.get("code"), str(data.get("message"))
    if code == "VALIDATION_ERROR" and kind == "step":
        raise RefusedActionError(_reasons(data.get("errors")) or text)
    hint = ": set rollout.concurrency to no more than its sessions" if code == "CAPACITY_REACHED" else ""
    raise SessionError(f"the server failed at {kind!r}: {text} ({code}{hint})")


def _reasons(errors: Any) -> str:
    """The errors of a validation in one line."""
    found = [error for error in errors if isinstance(error, dict)] if isinstance(errors, list) else []
    return "; ".join(f"{'.'.join(map(str, error.get('loc') or ()))}: {error.get('msg')}" for error in found)


async def _in_the_loop(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which runs in the sockets' loop."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _loop(os.getpid())))


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The sockets' event loop of a process (the threads of its parent are not in a forked one)."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="skillsd-openenv", daemon=True).start()
    return loop
