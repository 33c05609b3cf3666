"""Jails from the outside: the server that they are forked from, and a world's end of one of them.

See jail.py for what a jail is, and world.py for who talks to it. Deadlines are read from the kernel's clock: in an open
world Python's own stand still (freezegun).
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
MESSAGE = 4 << 20
"""Bytes of the longest message that a jail may send."""
_MODULES = ("copy", "datetime")
"""What the session is given of ``appworld.common``: the agent's dates and times."""
_ATTEMPTS: tuple[dict[str, bool], ...] = (
    {"namespaces": True, "user": True},
    {"namespaces": False, "user": True},
    {"namespaces": False, "user": False},
)
"""What a jail is asked to do without, if it does not come up otherwise."""
_TRIES = 3
"""Of each, so that what is wrong for a moment takes no protection away."""


class JailBrokenError(Exception):
    """The model's session is lost; the message is for the model."""


def _package() -> Path:
    """Where the engine lies, without the seconds that it takes to import."""
    spec = importlib.util.find_spec("appworld")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'appworld'")
    return Path(spec.origin).parent


class Jails:
    """The server that jails are forked from: a Python without the engine, the data or anything else of ours in it."""

    def __init__(self, options: dict[str, Any]) -> None:
        package = _package()
        modules = {name: (package / "common" / f"{name}.py").read_text() for name in _MODULES}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(Path(options["socket"]).parent / "jails"))
            listener.listen(1024)
            given = json.dumps({"listener": listener.fileno(), "parent": os.getpid(), "modules": modules})
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-s", str(HERE / "jail.py"), given],
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
        """The options of this machine's jails; ``held`` among them says what they hold.

        Found out once, so that no jail that fails for another reason, want of memory say, comes up with less.

        Raises:
            JailBrokenError: if there are none at all.
        """
        broken = JailBrokenError("no kind of jail is allowed")
        for attempt in _ATTEMPTS:
            for _ in range(_TRIES if attempt["namespaces"] <= self._options.get("namespaces", True) else 0):
                jail = Jail(self._options | attempt)
                try:
                    jail.start()
                    jail.greet({"apis": {}, "datetime": "2023-05-18T12:00:00"})
                    return self._options | attempt | {"held": jail.held}
                except JailBrokenError as error:
                    broken = error
                finally:
                    jail.stop()
        raise broken


class Jail:
    """The process that the model's code runs in; started again when it was lost."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._keeper: socket.socket | None = None
        self.held: list[str] = []

    def start(self) -> None:
        """Ask for it; `greet` waits until it is there.

        Raises:
            JailBrokenError: if nobody is there to be asked.
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
            raise JailBrokenError("there is no Python session to be had") from error
        finally:
            theirs.close()

    def greet(self, hello: dict[str, Any]) -> None:
        """Tell the session which APIs there are and what time it is.

        Raises:
            JailBrokenError: if it does not come up, or with less than this machine's jails hold.
        """
        deadline = now() + self._options["start_seconds"]
        self.held = self.receive(deadline)["held"]
        if missing := set(self._options.get("held", ())) - set(self.held):
            raise JailBrokenError(f"the Python session came up without {', '.join(sorted(missing))}")
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
            TimeoutError: if there is none before `deadline`.
            JailBrokenError: if there will be none, or it is no message.
        """
        if now() >= deadline:  # whatever is waiting: a flood of calls is no way round it
            raise TimeoutError
        while b"\n" not in self._buffer:
            if len(self._buffer) > MESSAGE:
                raise JailBrokenError("the Python session sent too much")
            self._wait(select.POLLIN, deadline)
            try:
                piece = self._channel.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                piece = b""
            if not piece:
                raise JailBrokenError("the Python session ended")
            self._buffer += piece
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
        """End it; it is gone afterwards. Stopping twice is harmless."""
        if self._keeper is None:
            return
        with contextlib.suppress(OSError):
            self._keeper.shutdown(socket.SHUT_WR)
            self._keeper.recv(1)  # hangs up when nothing of the jail is left
        self._keeper.close()
        self._keeper = None
        self._channel.close()
        shutil.rmtree(self._root, ignore_errors=True)
