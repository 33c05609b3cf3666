"""`skillsd envs serve`: run the OpenEnv server of a task set until it is interrupted."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

from skillsd.envs.base import TaskSet
from skillsd.envs.setups import Say
from skillsd.errors import UserError

LOCAL = "127.0.0.1"


def serve(
    task_set: TaskSet, say: Say, *, host: str = LOCAL, port: int = 8000, splits: Sequence[str] | None, sessions: int
) -> None:
    """Serve a task set until Ctrl-C.

    Args:
        host: address to listen on.
        port: 0 for any free one.
        splits, sessions: see `skillsd.envs.openenv.server.Server`.

    Raises:
        UserError: if this machine can't play the episodes, a package is missing, or the port can't be used.
    """
    try:
        import uvicorn
        import websockets  # noqa: F401 (uvicorn needs it)

        from skillsd.envs.openenv.server import Server
    except ImportError as error:
        raise UserError(f"`skillsd envs serve` needs {error.name}: pip install 'skillsd[serve]'") from error
    task_set.check_machine()
    server = Server(task_set, splits, sessions)
    with _listening(host, port) as listening:
        address, number = listening.getsockname()[:2]
        sizes = ", ".join(f"{split} {len(tasks)}" for split, tasks in server.splits.items())
        say(f"{task_set.name} ({sizes}), at most {sessions} sessions at a time")
        say(f"OpenEnv server at http://{f'[{address}]' if ':' in address else address}:{number}; Ctrl-C ends it")
        say(_reach(address))
        # Pings would end the sessions of clients that are busy: a trainer's process may not answer for minutes.
        config = uvicorn.Config(
            server.app(), ws="websockets-sansio", ws_ping_interval=None, log_level=logging.WARNING, lifespan="off",
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"can't listen on {host}, port {port}: {reason}. Choose others with --host and --port"
        ) from error


def _reach(address: str) -> str:
    """Who can connect, in words."""
    if address in (LOCAL, "::1"):
        return "only this machine can connect; for others: --host 0.0.0.0"
    return "every machine that reaches this one can connect and play: there is no password and no encryption"
