"""The trainer's side of AppWorld: starts the world server and talks to one world per episode.

Any fault of a world (hang, crash, malformed response) raises `WorldBrokenError` and kills the world (SIGKILL): the
episode is lost, and the collector retries it in a new world. Deadlines are enforced here, by wall-clock time.
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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HOST = Path(__file__).parent / "host"
MAX_MESSAGE_BYTES = 16 << 20
"""Longest response that is read."""

SLACK_SECONDS = 20.0
"""Time a world may take beyond the code's time limit: to end the session, start another, and respond."""

PROBE_SECONDS = 180.0
"""Time for finding out which jails this machine allows. It takes one or two seconds if nothing else is running."""

LIMITS: dict[str, Any] = {
    "memory_bytes": 1 << 30,  # of the model's code
    "file_bytes": 64 << 20,  # of a file, where writing files is not prevented
    "world_bytes": 3 << 30,  # address space of a world; it needs about 1 GiB
    "start_seconds": 15,  # for a jail to start; less than SLACK_SECONDS
}


PROTECTIONS = {
    "files": "the code can read nothing but Python and its libraries, and can't write files",
    "metadata": "the code can't see names, sizes and times of AppWorld's data",
    "network": "no network, including loopback",
    "processes": "no new processes or threads, no effect on others; the code ends with its episode",
    "user": "no privileges (capabilities), and no way to gain any",
    "syscalls": "no shared memory, kernel keys, locks, io_uring or tracing",
    "limits": "limits on memory, file size and open files",
}
"""The protections of a jail (host/jail.py), by name, with a description for users."""


def describe(missing: Iterable[str]) -> str:
    """Protections with their descriptions, for a message."""
    return "; ".join(f"{name} ({PROTECTIONS[name]})" for name in missing)


class WorldBrokenError(Exception):
    """An infrastructure failure, not a mistake of the agent. The world is gone."""


class WorldHungError(WorldBrokenError):
    """The world did not respond in time."""


def _clean(value: Any) -> Any:
    """Replace lone surrogates in a response's strings: code can print them, but tokenizers reject them."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return {_clean(key): _clean(item) for key, item in value.items()} if isinstance(value, dict) else value


def protections(python: Path, root: Path) -> list[str]:
    """The protections available on this machine, as names from `PROTECTIONS`.

    Args:
        python: AppWorld's interpreter.
        root: the folder that contains ``data``.

    Raises:
        WorldBrokenError: if no jail starts.
    """
    command = [str(python), str(HOST / "probe.py"), json.dumps(LIMITS), str(root)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        return list(json.loads(done.stdout))
    except subprocess.TimeoutExpired as error:
        raise WorldBrokenError(f"no jail started within {PROBE_SECONDS:g} s") from error
    except (OSError, ValueError) as error:
        reason = done.stderr.strip().splitlines()[-1:] if isinstance(error, ValueError) else [str(error)]
        raise WorldBrokenError(f"no jail starts: {' '.join(reason) or 'no reason given'}") from error


class Host:
    """The world server for one root folder: started on first use, and restarted if it died.

    Args:
        python: AppWorld's interpreter.
        root: the folder that contains ``data``.
        start_seconds: deadline for the server's start, including imports.
        limits: overrides of `LIMITS`; ``kinds`` are the kinds of jails to try, strongest first (host/jail.py).
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
        """Start the server if it isn't running.

        Raises:
            WorldBrokenError: if it does not start; the message has the end of its log.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._stop()
            self._folder = Path(tempfile.mkdtemp(prefix="skillsd-appworld-"))  # accessible to its owner only
            options = self._limits | {"root": str(self._root), "data": str(self._root), "socket": str(self.address)}
            environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
            with (self._folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [str(self._python), str(HOST / "forkserver.py"), json.dumps(options)],
                    stdin=subprocess.PIPE,  # closed when this process ends, which ends the server
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
                raise WorldBrokenError(f"AppWorld's server did not start: {' '.join(tail) or 'its log is empty'}")

    def stop(self) -> None:
        """Kill the server and all its worlds. Idempotent."""
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
    """This process's server for `root`; created on the first call."""
    return _hosts.setdefault((python, root), Host(python, root))


class World:
    """One open world. Create it with `World.open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._pid: int | None = None
        self.apps: list[str] = []
        self.protections: list[str] = []

    @classmethod
    async def open(cls, server: Host, task_id: str, seconds: float) -> World:
        """Open a new world for a task.

        Raises:
            WorldBrokenError: if that fails or takes longer than `seconds`.
        """
        await asyncio.to_thread(server.ensure)
        try:
            reader, writer = await asyncio.open_unix_connection(server.address, limit=MAX_MESSAGE_BYTES)
        except OSError as error:
            raise WorldBrokenError(f"AppWorld's server can't be reached: {error}") from error
        world = cls(reader, writer)
        try:
            hello = await world._ask(seconds, "hello", expected={"pid": int})
        except WorldHungError:
            await asyncio.to_thread(server.stop)  # the server itself hangs: start a new one next time
            raise
        world._pid = hello["pid"]
        answer = await world._ask(seconds, "open", expected={"apps": list, "protections": list}, task_id=task_id)
        world.apps, world.protections = answer["apps"], answer["protections"]
        return world

    async def execute(self, code: str, seconds: float) -> dict[str, Any]:
        """Run `code` with a limit of `seconds`; the response may take a little longer. See host/world.py."""
        kinds = {"output": str, "error": (str, type(None)), "calls": list, "completed": bool}
        return await self._ask(seconds + SLACK_SECONDS, "execute", expected=kinds, code=code, seconds=seconds)

    async def evaluate(self, seconds: float = 30.0) -> dict[str, Any]:
        """Run the task's tests on the current databases. See `Episode.evaluate` in host/world.py."""
        return await self._ask(seconds, "evaluate", expected={"success": bool, "passes": list, "failures": list})

    async def close(self) -> None:
        """Close the world. Idempotent."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def kill(self) -> None:
        """Kill the world's process."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, signal.SIGKILL)  # the server kills the rest of its process group
        self._writer.close()

    async def _ask(self, within: float, op: str, *, expected: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(within):
                self._writer.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
                await self._writer.drain()
                line = await self._reader.readline()
            if not line:
                self._pid = None  # the process has ended, and its pid may be reused
                raise WorldBrokenError(f"AppWorld's world died during {op!r}")
            try:
                answer = json.loads(line)
            except ValueError:
                answer = None
            if not isinstance(answer, dict) or not ({"ok", "error"} & answer.keys()):
                raise WorldBrokenError(f"AppWorld's world sent a malformed response to {op!r}: {line[:80]!r}")
            if "error" in answer:
                raise WorldBrokenError(f"AppWorld's world failed at {op!r}: {answer['error']}")
            found = _clean(answer["ok"])
            fits = isinstance(found, dict)
            wrong = [key for key, kind in expected.items() if not (fits and isinstance(found.get(key), kind))]
            if wrong:
                raise WorldBrokenError(f"AppWorld's world sent a response to {op!r} without a valid {wrong[0]!r}")
            return found
        except TimeoutError:
            self.kill()
            raise WorldHungError(f"AppWorld's world took longer than {within:g} s for {op!r}: killed") from None
        except (OSError, ValueError) as error:  # a broken connection, or a line that is too long
            self.kill()
            raise WorldBrokenError(f"AppWorld's world broke during {op!r}: {error}") from error
        except BaseException:  # WorldBrokenError from above, and cancellation: leave no process behind
            self.kill()
            raise
