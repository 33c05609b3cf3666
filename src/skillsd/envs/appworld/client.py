"""The trainer's side: starts the server of worlds and talks to one world an episode. Never imports `appworld`.

Everything that a world may do wrong (hang, die, answer nonsense) ends in `WorldBrokenError` and a SIGKILL: the
episode is lost, and played again in a fresh world. The deadlines are kept here, on the wall clock.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HOST = Path(__file__).parent / "host"
MESSAGE = 16 << 20
"""Bytes of the longest answer that is read."""

SLACK_SECONDS = 20.0
"""What a world may take on top of the code's own time: to end a session, begin another, and say so."""

LIMITS: dict[str, Any] = {
    "memory_bytes": 1 << 30,  # of the model's code
    "scratch_bytes": 64 << 20,  # of its scratch folder, and of the largest file
    "world_bytes": 3 << 30,  # address space of a world; it needs about 1
    "start_seconds": 15,  # for a jail to come up; below SLACK_SECONDS
}


PROTECTIONS = {
    "files": "AppWorld's data and your files are out of sight, nothing can be written but a scratch folder",
    "network": "no network, not even loopback",
    "processes": "what the code starts ends with its episode",
    "user": "an unprivileged user that can hardly start processes",
    "syscalls": "no shared memory, kernel keys, vsock, io_uring, tracing",
    "limits": "memory, file size and open files are limited",
}
"""What a jail may hold (host/jail.py), in words."""


class WorldBrokenError(Exception):
    """The infrastructure failed, not the agent. The world is gone."""


class WorldHungError(WorldBrokenError):
    """It gave no answer in time."""


def _clean(value: Any) -> Any:
    """An answer whose texts are text: half a surrogate pair, which code can print, no tokenizer takes."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return {_clean(key): _clean(item) for key, item in value.items()} if isinstance(value, dict) else value


def protections(python: Path) -> list[str]:
    """What holds on this machine, of the names in `PROTECTIONS`; nothing if not even a jail starts."""
    command = [str(python), str(HOST / "probe.py"), json.dumps(LIMITS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return list(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


class Host:
    """The server of worlds for one root folder: started when it is first needed, again if it died, once a process.

    Args:
        python: AppWorld's interpreter.
        root: the folder that holds ``data``.
        start_seconds: the longest that the imports may take.
        limits: other values than `LIMITS`; ``namespaces: False`` does without them, as some machines have to.
    """

    def __init__(
        self, python: Path, root: Path, start_seconds: float = 180.0, limits: Mapping[str, Any] | None = None
    ) -> None:
        self._python, self._root, self._start_seconds = python, root, start_seconds
        self._limits = LIMITS | dict(limits or {})
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    @property
    def address(self) -> Path:
        assert self._folder is not None
        return self._folder / "socket"

    def ensure(self) -> None:
        """Have the server running.

        Raises:
            WorldBrokenError: if it does not start, with the end of its log.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._stop()
            self._folder = Path(tempfile.mkdtemp(prefix="skillsd-appworld-"))  # only its owner may enter
            options = self._limits | {"root": str(self._root), "data": str(self._root), "socket": str(self.address)}
            environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
            with (self._folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [str(self._python), str(HOST / "forkserver.py"), json.dumps(options)],
                    stdin=subprocess.PIPE,  # closed when this process ends, and then the server ends too
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment | {"APPWORLD_ROOT": str(self._root), "PYTHONDONTWRITEBYTECODE": "1"},
                    cwd=self._root,
                    start_new_session=True,
                )
            atexit.register(self.stop)
            assert self._process.stdout is not None
            started = select.poll()
            started.register(self._process.stdout, select.POLLIN | select.POLLHUP)
            if not started.poll(self._start_seconds * 1000) or self._process.stdout.readline() != b"ready\n":
                tail = (self._folder / "log").read_text(errors="replace").strip().splitlines()[-3:]
                self._stop()
                raise WorldBrokenError(f"AppWorld's server did not start: {' '.join(tail) or 'it said nothing'}")

    def stop(self) -> None:
        """Kill every world and the server. Stopping twice is harmless."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


_hosts: dict[tuple[Path, Path], Host] = {}


def host(python: Path, root: Path) -> Host:
    """The one server of this process for `root`."""
    return _hosts.setdefault((python, root), Host(python, root))


class World:
    """One open world. Made by `World.open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._pid: int | None = None
        self.apps: list[str] = []
        self.held: list[str] = []

    @classmethod
    async def open(cls, server: Host, task_id: str, seconds: float) -> World:
        """A fresh world of a task.

        Raises:
            WorldBrokenError: if there is none within `seconds`.
        """
        await asyncio.to_thread(server.ensure)
        try:
            reader, writer = await asyncio.open_unix_connection(server.address, limit=MESSAGE)
        except OSError as error:
            raise WorldBrokenError(f"AppWorld's server can't be reached: {error}") from error
        world = cls(reader, writer)
        try:
            hello = await world._ask(seconds, "hello", expected={"pid": int})
        except WorldHungError:
            await asyncio.to_thread(server.stop)  # it does not even fork: the next one begins with a new server
            raise
        world._pid = hello["pid"]
        answer = await world._ask(seconds, "open", expected={"apps": list, "held": list}, task_id=task_id)
        world.apps, world.held = answer["apps"], answer["held"]
        return world

    async def execute(self, code: str, seconds: float) -> dict[str, Any]:
        """Run `code`; it has `seconds`, the world a little more to say so. See `Episode.execute` in host/world.py."""
        kinds = {"output": str, "error": (str, type(None)), "calls": list, "completed": bool}
        return await self._ask(seconds + SLACK_SECONDS, "execute", expected=kinds, code=code, seconds=seconds)

    async def evaluate(self, seconds: float = 30.0) -> dict[str, Any]:
        """What the task's tests say of the databases now. See `Episode.evaluate` in host/world.py."""
        return await self._ask(seconds, "evaluate", expected={"success": bool, "passes": list, "failures": list})

    async def close(self) -> None:
        """End the world. Closing twice is harmless."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def kill(self) -> None:
        """End it without asking."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, signal.SIGKILL)  # the server kills what is left of its process group
        self._writer.close()

    async def _ask(self, within: float, op: str, *, expected: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(within):
                self._writer.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
                await self._writer.drain()
                line = await self._reader.readline()
            if not line:
                self._pid = None  # ended by itself, and its number may be another's by now
                raise WorldBrokenError(f"AppWorld's world died during {op!r}")
            try:
                answer = json.loads(line)
            except ValueError:
                answer = None
            if not isinstance(answer, dict) or not ({"ok", "error"} & answer.keys()):
                raise WorldBrokenError(f"AppWorld's world answered {op!r} with nonsense: {line[:80]!r}")
            if "error" in answer:
                raise WorldBrokenError(f"AppWorld's world failed at {op!r}: {answer['error']}")
            found = _clean(answer["ok"])
            fits = isinstance(found, dict)
            wrong = [key for key, kind in expected.items() if not (fits and isinstance(found.get(key), kind))]
            if wrong:
                raise WorldBrokenError(f"AppWorld's world answered {op!r} without a usable {wrong[0]!r}")
            return found
        except TimeoutError:
            self.kill()
            raise WorldHungError(f"AppWorld's world took longer than {within:g} s for {op!r}: killed") from None
        except (OSError, ValueError) as error:  # a broken connection, or a line without end
            self.kill()
            raise WorldBrokenError(f"AppWorld's world broke during {op!r}: {error}") from error
        except BaseException:  # our own WorldBrokenError, and being cancelled: nothing may be left behind
            self.kill()
            raise
