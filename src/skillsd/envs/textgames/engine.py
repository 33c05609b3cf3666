"""The engines of text games, as pools of host processes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillsd.envs import hosts
from skillsd.envs.own_venv import OwnVenv
from skillsd.errors import UserError

SERVE = Path(__file__).parent / "host" / "serve.py"


@dataclass(frozen=True)
class Engine:
    """An engine in a virtual environment of its own.

    Attributes:
        venv: the environment.
        module: its module in ``host/``.
        start_seconds: deadline for a host's start.
        recycle: number of episodes that a host serves before it is replaced.
    """

    venv: OwnVenv
    module: str
    start_seconds: float = 120.0
    recycle: int = 1000

    def host(self) -> hosts.Host:
        """A new host.

        Raises:
            UserError: if the engine is not installed.
        """
        python = str(self.venv.python())

        def command(socket: Path) -> list[str]:
            return [python, str(SERVE), self.module, str(socket)]

        return hosts.Host(
            f"{self.venv.title}'s host",
            command,
            start_seconds=self.start_seconds,
            env={"PYTHONDONTWRITEBYTECODE": "1"},
        )

    def ask(self, host: hosts.Host, op: str, seconds: float, expected: hosts.Kinds, /, **arguments: Any) -> Any:
        """A request outside an episode, twice if the first host breaks; see `hosts.Host.ask`.

        Raises:
            UserError: if both fail.
        """
        for last in (False, True):
            try:
                return host.ask(op, seconds, expected, **arguments)
            except hosts.HostBrokenError as error:
                if last:
                    raise UserError(f"{error}. Is it set up? `{self.venv.command}`") from error


@functools.cache
def pool(engine: Engine, size: int) -> hosts.Pool:
    """This process's hosts of an engine.

    Raises:
        UserError: if the engine is not installed.
    """
    return hosts.Pool(engine.host, size, engine.recycle)
