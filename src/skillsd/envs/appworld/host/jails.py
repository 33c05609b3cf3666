"""Clients of jails: starting the server they are forked from, and a world's connection to one jail.

See jail.py for the jail itself and world.py for its use. Deadlines use the kernel's clock, because Python's clocks are
frozen in an open world (freezegun).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

now = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)

HERE = Path(__file__).parent
MAX_MESSAGE_BYTES = 4 << 20
"""Longest message accepted from a jail."""
_MODULES = ("copy", "datetime")
"""Modules of ``appworld.common`` that the session gets: the date and time classes for the agent."""
_KINDS = ("namespaces", "landlock", "bare")
"""Kinds of jails (jail.py) to try, strongest first."""
_ATTEMPTS_PER_KIND = 3
"""So that a transient failure doesn't cost a protection."""


class JailBrokenError(Exception):
    """The model's session is lost. Most messages are shown to the model, so results depend on their wording."""


def _package() -> Path:
    """The engine's folder, found without importing it (which takes seconds)."""
    spec = importlib.util.find_spec("appworld")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'appworld'")
    return Path(spec.origin).parent


class Jails:
    """The server that jails are forked from: a Python process without the engine, the data or skillsd in it."""

    def __init__(self, options: dict[str, Any]) -> None:
        package = _package()
        modules = {name: (package / "common" / f"{name}.py").read_text() for name in _MODULES}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(Path(options["socket"]).parent / "jails"))
            listener.listen(1024)
            given = json.dumps({"listener": listener.fileno(), "parent": os.getpid(), "modules": modules})
            self.process = subprocess.Popen(
                [sys.executable, "-B", "-P", "-s", str(HERE / "jail.py"), given],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            )
        self._options = options | {
            "prefixes": [sys.base_prefix, sys.prefix],
            "hidden": [str(package), os.path.realpath(options["data"])],
        }

    def strongest(self) -> dict[str, Any]:
        """Options for the strongest kind of jail that starts on this machine, with its ``protections``.

        Determined once: later, a jail that fails for another reason (e.g. lack of memory) must not start as a weaker
        kind.

        Raises:
            JailBrokenError: if no kind of jail starts.
        """
        broken = JailBrokenError("no kind of jail is allowed")
        for kind in self._options.get("kinds", _KINDS):
            for _ in range(_ATTEMPTS_PER_KIND):
                jail = Jail(self._options | {"kind": kind})
                try:
                    jail.start()
                    jail.greet({"apis": {}, "datetime": "2023-05-18T12:00:00"})
                    return self._options | {"kind": kind, "protections": jail.protections}
                except JailBrokenError as error:
                    broken = error
                finally:
                    jail.stop()
        raise broken


class Jail:
    """A connection to the process that runs the model's code. Can be restarted if the process is lost."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._keeper: socket.socket | None = None
        self.protections: list[str] = []

    def start(self) -> None:
        """Request a jail. `greet` waits until it is running.

        Raises:
            JailBrokenError: if the jail server can't be reached.
        """
        folder = Path(self._options["socket"]).parent
        self._root = tempfile.mkdtemp(prefix=f"jail-{os.getpid()}-", dir=folder)
        request = self._options | {"root": self._root, "number": os.getpid()}
        self._channel, theirs = socket.socketpair()
        self._buffer = b""
        self._keeper = socket.socket(socket.AF_UNIX)
        try:
            self._keeper.connect(str(folder / "jails"))
            socket.send_fds(self._keeper, [json.dumps(request).encode() + b"\n"], [theirs.fileno()])
        except OSError as error:
            raise JailBrokenError("the server of Python sessions can't be reached") from error
        finally:
            theirs.close()

    def greet(self, hello: dict[str, Any]) -> None:
        """Wait for the jail, check its protections, and send the APIs and the time.

        Raises:
            JailBrokenError: if it doesn't start, or starts with fewer protections than this machine's jails have.
        """
        deadline = now() + self._options["start_seconds"]
        self.protections = self.receive(deadline)["protections"]
        if missing := set(self._options.get("protections", ())) - set(self.protections):
            raise JailBrokenError(f"the Python session started without {', '.join(sorted(missing))}")
        self.send(hello, deadline)

    @property
    def alive(self) -> bool:
        return self._keeper is not None

    def send(self, message: dict[str, Any], deadline: float) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        self._channel.setblocking(False)
        while data:
            self._wait(select.POLLOUT, deadline)
            try:
                data = data[self._channel.send(data) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise JailBrokenError("the Python session ended") from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message.

        Raises:
            TimeoutError: if none arrives before `deadline`.
            JailBrokenError: if the session has ended or sent an invalid message.
        """
        if now() >= deadline:  # even if a message is waiting: a flood of calls must not bypass the deadline
            raise TimeoutError
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_MESSAGE_BYTES:
                raise JailBrokenError("the Python session sent too much")
            self._wait(select.POLLIN, deadline)
            try:
                chunk = self._channel.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                chunk = b""
            if not chunk:
                raise JailBrokenError("the Python session ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise JailBrokenError("the Python session sent something that is no message")
        return message

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._channel, event)
        if not poll.poll(max(0, (deadline - now()) * 1000)):
            raise TimeoutError

    def stop(self) -> None:
        """End the jail and wait until all its processes are gone. Idempotent."""
        if self._keeper is None:
            return
        with contextlib.suppress(OSError):
            self._keeper.shutdown(socket.SHUT_WR)
            self._keeper.recv(1)  # closed once all processes of the jail are gone
        self._keeper.close()
        self._keeper = None
        self._channel.close()
        shutil.rmtree(self._root, ignore_errors=True)
