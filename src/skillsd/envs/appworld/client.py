"""The trainer's side of AppWorld: the world server as a host, and a session for each world.

Unlike other hosts, the server forks a process for each session, so that a fault kills only that world.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from skillsd.envs import hosts
from skillsd.envs.hosts import HostBrokenError, HostHungError

HOST = Path(__file__).parent / "host"
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


def protections(python: Path, root: Path) -> list[str]:
    """The protections available on this machine, as names from `PROTECTIONS`.

    Args:
        python: AppWorld's interpreter.
        root: the folder that contains ``data``.

    Raises:
        HostBrokenError: if no jail starts.
    """
    command = [str(python), str(HOST / "probe.py"), json.dumps(LIMITS), str(root)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        return list(json.loads(done.stdout))
    except subprocess.TimeoutExpired as error:
        raise HostBrokenError(f"no jail started within {PROBE_SECONDS:g} s") from error
    except (OSError, ValueError) as error:
        reason = done.stderr.strip().splitlines()[-1:] if isinstance(error, ValueError) else [str(error)]
        raise HostBrokenError(f"no jail starts: {' '.join(reason) or 'no reason given'}") from error


class Host(hosts.Host):
    """The world server for one root folder.

    Args:
        python: AppWorld's interpreter.
        root: the folder that contains ``data``.
        start_seconds: deadline for the server's start, including imports.
        limits: overrides of `LIMITS`; ``kinds`` are the kinds of jails to try, strongest first (host/jail.py).
    """

    def __init__(
        self, python: Path, root: Path, start_seconds: float = 180.0, limits: Mapping[str, Any] | None = None
    ) -> None:
        options = LIMITS | dict(limits or {}) | {"root": str(root), "data": str(root)}

        def command(socket: Path) -> list[str]:
            return [str(python), str(HOST / "forkserver.py"), json.dumps(options | {"socket": str(socket)})]

        env = {"APPWORLD_ROOT": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        super().__init__("AppWorld's server", command, start_seconds=start_seconds, cwd=root, env=env)


_hosts: dict[tuple[Path, Path], Host] = {}


def host(python: Path, root: Path) -> Host:
    """This process's server for `root`; created on the first call."""
    return _hosts.setdefault((python, root), Host(python, root))


class World(hosts.Session):
    """One open world. Create it with `World.open`."""

    title = "AppWorld's world"
    apps: list[str]
    protections: list[str]
    _pid: int | None = None

    @classmethod
    async def open(cls, server: hosts.Host, task_id: str, seconds: float) -> World:
        """Open a new world for a task.

        Raises:
            HostBrokenError: if that fails or takes longer than `seconds`.
        """
        world = await cls.connect(server)
        try:
            hello = await world.ask("hello", seconds, {"pid": int})
        except HostHungError:
            await asyncio.to_thread(server.stop)  # the server itself hangs: start a new one next time
            raise
        world._pid = hello["pid"]
        answer = await world.ask("open", seconds, {"apps": list, "protections": list}, task_id=task_id)
        world.apps, world.protections = answer["apps"], answer["protections"]
        return world

    async def execute(self, code: str, seconds: float) -> dict[str, Any]:
        """Run `code` with a limit of `seconds`; the response may take a little longer. See host/world.py."""
        kinds: hosts.Kinds = {"output": str, "error": (str, type(None)), "calls": list, "completed": bool}
        return await self.ask("execute", seconds + SLACK_SECONDS, kinds, code=code, seconds=seconds)

    async def evaluate(self, seconds: float = 30.0) -> dict[str, Any]:
        """Run the task's tests on the current databases. See `Episode.evaluate` in host/world.py."""
        return await self.ask("evaluate", seconds, {"success": bool, "passes": list, "failures": list})

    def gone(self) -> None:
        self._pid = None  # the process has ended, and its pid may be reused

    def kill(self) -> None:
        """Kill the world's process."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, signal.SIGKILL)  # the server kills the rest of its process group
        super().drop()

    def drop(self) -> None:
        self.kill()
