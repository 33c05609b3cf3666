"""Host processes: an environment's engine that runs in another interpreter, and the sessions that talk to it.

A `Host` is a process that listens on a Unix socket. It is started on first use, and replaced if it died. A `Session` is
one connection, for one episode: a request and a response at a time, each a line of JSON: ``{"op": ..., **arguments}``
and ``{"ok": {...}}`` or ``{"error": "..."}``. A `Pool` is several hosts of one kind that share the sessions.

Any fault (a crash, a missed deadline, a malformed response) raises `HostBrokenError` and kills what served the session:
the episode is lost, and the collector retries it on a new host. Deadlines are enforced here, by wall-clock time.

A host prints ``ready`` when it listens, and ends when its standard input is closed, that is when this process has ended
for whatever reason.
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
import socket
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from skillsd.envs import values

MAX_MESSAGE_BYTES = 16 << 20
"""Longest response that is read."""

Kinds = Mapping[str, type | tuple[type, ...]]
"""The keys that a response must have, with their types."""


class HostBrokenError(Exception):
    """An infrastructure failure, not a mistake of the agent. The session is over."""


class HostHungError(HostBrokenError):
    """There was no response in time."""


class HostReportedError(HostBrokenError):
    """The host reports a fault of the session, and is well itself."""


class Host:
    """One host process.

    Args:
        title: for messages, e.g. ``AppWorld's server``.
        command: the command that serves on a socket, given the socket's path.
        start_seconds: deadline for its start.
        cwd: its working folder.
        env: variables to add to its environment, which has only what a program needs (`_INHERITED`).
    """

    def __init__(
        self,
        title: str,
        command: Callable[[Path], Sequence[str]],
        *,
        start_seconds: float = 180.0,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.title = title
        self._command, self._start_seconds, self._cwd, self._env = command, start_seconds, cwd, dict(env or {})
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._killed: int | None = None
        self._folder: Path | None = None
        self.sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        """The open sessions."""
        self.opening = 0
        """Number of sessions that a `Pool` is opening."""
        self.served = 0
        """Number of sessions of the current process."""

    @property
    def address(self) -> Path:
        assert self._folder is not None
        return self._folder / "socket"

    @property
    def pid(self) -> int | None:
        """The process id, also of its process group; None if it was not started."""
        return None if self._process is None else self._process.pid

    def ensure(self) -> None:
        """Start the host if it isn't running.

        Raises:
            HostBrokenError: if it does not start; the message has the end of its log.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is None and self.pid != self._killed:
                return
            self._stop()
            self.served, self._killed = 0, None
            self._folder = Path(tempfile.mkdtemp(prefix="skillsd-host-"))  # accessible to its owner only
            inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
            with (self._folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    self._command(self.address),
                    stdin=subprocess.PIPE,  # closed when this process ends, which ends the host
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=inherited | self._env,
                    cwd=self._cwd,
                    start_new_session=True,
                )
            atexit.register(self.stop)
            assert self._process.stdout is not None
            started = select.poll()
            started.register(self._process.stdout, select.POLLIN | select.POLLHUP)
            if not started.poll(self._start_seconds * 1000) or self._process.stdout.readline() != b"ready\n":
                tail = (self._folder / "log").read_text(errors="replace").strip().splitlines()[-3:]
                self._stop()
                raise HostBrokenError(f"{self.title} did not start: {' '.join(tail) or 'its log is empty'}")

    def stop(self) -> None:
        """End the host and what it serves. Idempotent."""
        with self._lock:
            self._stop()

    def kill(self, pid: int | None) -> None:
        """Kill the process group `pid` now, if it is still this host's; `ensure` starts another one."""
        process = self._process  # without the lock, which is held while a host starts
        if process is not None and process.pid == pid and process.poll() is None:
            self._killed = pid  # it may take a moment to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _stop(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.kill(self.pid)
                self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        atexit.unregister(self.stop)

    def ask(self, op: str, seconds: float, expected: Kinds, /, **arguments: Any) -> dict[str, Any]:
        """One request in a session of its own, without an event loop: blocks.

        Raises:
            HostBrokenError: as in `Session.ask`.
        """
        self.ensure()
        pid = self.pid
        try:
            with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answers:
                connection.settimeout(seconds)
                connection.connect(str(self.address))
                connection.sendall(_request(op, arguments))
                return _result(self.title, op, answers.readline(MAX_MESSAGE_BYTES), expected)
        except HostReportedError:
            raise
        except TimeoutError:
            self.kill(pid)
            raise HostHungError(f"{self.title} took longer than {seconds:g} s for {op!r}: killed") from None
        except OSError as error:
            self.kill(pid)
            raise HostBrokenError(f"{self.title} broke during {op!r}: {error}") from error
        except HostBrokenError:
            self.kill(pid)
            raise


_INHERITED = ("PATH", "HOME", "LANG", "TMPDIR")


class Session:
    """One connection to a host. Create it with `connect`."""

    title: str = ""
    """What serves the session, for messages; by default the host's title."""

    def __init__(self, host: Host, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.title = self.title or host.title
        self._host, self._reader, self._writer = host, reader, writer
        self._host_pid = host.pid

    @classmethod
    async def connect(cls, host: Host) -> Self:
        """Open a session, after starting the host if necessary.

        Raises:
            HostBrokenError: if the host can't be started or reached.
        """
        await asyncio.to_thread(host.ensure)
        try:
            reader, writer = await asyncio.open_unix_connection(host.address, limit=MAX_MESSAGE_BYTES)
        except OSError as error:
            raise HostBrokenError(f"{host.title} can't be reached: {error}") from error
        session = cls(host, reader, writer)
        host.sessions.add(session)
        host.served += 1
        return session

    async def ask(self, op: str, seconds: float, expected: Kinds, /, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its result.

        Raises:
            HostHungError: if there is no response within `seconds`; the session has been killed.
            HostBrokenError: if the host reports an error or sends anything invalid, or the connection breaks; the
                session has been killed.
        """
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(_request(op, arguments))
                await self._writer.drain()
                line = await self._reader.readline()
            if not line:
                self.gone()
            return _result(self.title, op, line, expected)
        except TimeoutError:
            self.kill()
            raise HostHungError(f"{self.title} took longer than {seconds:g} s for {op!r}: killed") from None
        except (OSError, ValueError) as error:  # a broken connection, or a line that is too long
            self.kill()
            raise HostBrokenError(f"{self.title} broke during {op!r}: {error}") from error
        except HostReportedError:
            self.drop()
            raise
        except HostBrokenError:
            self.kill()
            raise
        except BaseException:  # a cancellation
            self.drop()
            raise

    async def close(self) -> None:
        """Close the session. Idempotent."""
        self._host.sessions.discard(self)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def gone(self) -> None:
        """Called when the connection was closed by the other side."""

    def drop(self) -> None:
        """End the session after an error that the host reported, or a cancellation: the host stays."""
        self._host.sessions.discard(self)
        self._writer.close()

    def kill(self) -> None:
        """Kill what serves the session: the host, with all its sessions.

        A session with a process of its own overrides this, and `drop`.
        """
        self._host.kill(self._host_pid)
        self.drop()


S = TypeVar("S", bound=Session)


class Pool:
    """Hosts of one kind. A new session goes to the host with the fewest; hosts are started as they are needed.

    Args:
        make: makes a host.
        size: maximum number of hosts that take new sessions.
        recycle: a host that has served this many sessions takes no more, and is stopped after the last one: engines
            that leak memory don't fill the machine.
    """

    def __init__(self, make: Callable[[], Host], size: int, recycle: int) -> None:
        self._make, self._recycle = make, recycle
        self.hosts = [make() for _ in range(size)]
        """The hosts that take new sessions."""
        self.retired: list[Host] = []
        """Hosts that take no new sessions, and still have some."""

    async def connect(self, kind: type[S]) -> S:
        """Open a session of this kind.

        Raises:
            HostBrokenError: as `Session.connect`.
        """
        for place, host in enumerate(self.hosts):
            if host.served >= self._recycle:
                self.retired.append(host)
                self.hosts[place] = self._make()
        for host in [host for host in self.retired if not host.sessions and not host.opening]:
            self.retired.remove(host)
            await asyncio.to_thread(host.stop)
        chosen = self.any()
        chosen.opening += 1
        try:
            return await kind.connect(chosen)
        finally:
            chosen.opening -= 1

    def any(self) -> Host:
        """The host with the fewest sessions."""
        return min(self.hosts, key=lambda host: len(host.sessions) + host.opening)

    def stop(self) -> None:
        """Stop all hosts. They are started again when they are needed."""
        for host in (*self.hosts, *self.retired):
            host.stop()


def _request(op: str, arguments: Mapping[str, Any]) -> bytes:
    return json.dumps({"op": op, **arguments}).encode() + b"\n"


def _result(title: str, op: str, line: bytes, expected: Kinds) -> dict[str, Any]:
    """The result in a response.

    Raises:
        HostBrokenError: if there is none.
    """
    if not line:
        raise HostBrokenError(f"{title} died during {op!r}")
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not ({"ok", "error"} & answer.keys()):
        raise HostBrokenError(f"{title} sent a malformed response to {op!r}: {line[:80]!r}")
    if "error" in answer:
        raise HostReportedError(f"{title} failed at {op!r}: {answer['error']}")
    found = values.valid_unicode(answer["ok"])
    fits = isinstance(found, dict)
    wrong = [key for key, kind in expected.items() if not (fits and isinstance(found.get(key), kind))]
    if wrong:
        raise HostBrokenError(f"{title} sent a response to {op!r} without a valid {wrong[0]!r}")
    result: dict[str, Any] = found
    return result
