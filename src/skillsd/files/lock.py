"""A lock on a folder or file against other processes, which says who holds it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from skillsd.errors import UserError
from skillsd.files.write import make_folder, writing


@contextmanager
def locked(path: Path, what: str, remedy: str) -> Iterator[IO[str] | None]:
    """Hold an exclusive lock while the block runs. The system releases it when the process ends, however it ends.

    Args:
        path: the lock file, created and removed again. It holds the process, the host and the time.
        what: what is locked, for the error: "the run 'runs/a'".
        remedy: what to do if another process holds it.

    Yields:
        The lock file: a child process that inherits it holds the lock as well. None if the system has no locks.

    Raises:
        UserError: if another process holds the lock, with that process.
    """
    try:
        import fcntl
    except ImportError:  # not available on Windows
        yield None
        return
    make_folder(path.parent)
    while True:
        with writing(path):
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = _holder(file.read(10_000))
            file.close()
            raise UserError(f"{holder} is using {what}: {remedy}") from None
        except OSError:  # a file system without locks
            file.close()
            yield None
            return
        if _is_current(file, path):
            break
        file.close()  # its holder has just removed it: lock the new one
    children = _ClosedInChildren(file)
    try:
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        with suppress(OSError):  # on a full disk the lock holds without a name
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}))
            file.flush()
        yield file
    finally:
        with suppress(OSError):
            path.unlink()
        children.end()
        with suppress(OSError):
            file.close()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock now. False if the system has no locks."""
    try:
        import fcntl

        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # no locks here, or no such file
        return False
    return False


class _ClosedInChildren:
    """Closes the file in forked children, which would otherwise hold the lock after this process has been killed."""

    def __init__(self, file: IO[str]) -> None:
        self._file: IO[str] | None = file
        os.register_at_fork(after_in_child=self._close)

    def end(self) -> None:
        self._file = None

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


def _is_current(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _holder(text: str) -> str:
    """The process that holds a lock, in words."""
    try:
        found: dict[str, Any] = json.loads(text)
        pid, here = int(found["pid"]), found["host"] == socket.gethostname()
        process = f"process {pid} on {found['host']} (since {found['since']})"
    except (ValueError, KeyError, TypeError):  # it has just been created
        return "another process"
    if here and pid == os.getpid():
        return f"this process itself, {process},"
    return f"a child of {process}, which has ended itself," if here and not _lives(pid) else process


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True
