"""Start commands as processes. Those of `skillsd` share one start-up.

Importing torch and transformers takes about eight CPU seconds, as long as many iterations of a tiny agent. So these
processes are forked from a server process (`multiprocessing`'s) that has imported the packages and nothing else: no
model, no threads, no CUDA. Other commands, and systems without fork, get an ordinary process.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, Protocol

SKILLSD = (sys.executable, "-m", "skillsd")
"""Beginning of a command of `skillsd`."""


class Process(Protocol):
    """What the runner needs of a process."""

    @property
    def pid(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def wait(self) -> int: ...


def start(command: Sequence[str], log: Path, lock: IO[str] | None) -> Process:
    """Start a command.

    Args:
        log: its output is appended to this file, after the command itself.
        lock: a locked file that the process keeps open, so that it stays locked if the process outlives this one.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        if tuple(command[: len(SKILLSD)]) == SKILLSD and "forkserver" in multiprocessing.get_all_start_methods():
            return _Forked(command[len(SKILLSD) :], log, lock)
        kept = (lock.fileno(),) if lock else ()
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, pass_fds=kept
        )


class _Forked:
    """A command of `skillsd` in a process that the server forks."""

    def __init__(self, arguments: Sequence[str], log: Path, lock: IO[str] | None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["skillsd.sweeps.preload"])
        self._process = context.Process(target=_main, args=(list(arguments), str(log), dict(os.environ), _Kept(lock)))
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> int:
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        return code


class _Kept:
    """A file that is handed to the new process and stays open in it."""

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file

    def __getstate__(self) -> dict[str, Any]:  # called while a process is being started, which takes the file along
        return {"_file": None, "_handed": DupFd(self._file.fileno()) if self._file else None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        if state["_handed"] is not None:
            state["_handed"].detach()


def _main(arguments: list[str], log: str, environment: dict[str, str], kept: _Kept) -> None:
    """In the new process: like ``python -m skillsd ARGUMENTS``."""
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    sys.argv = ["skillsd", *arguments]
    try:
        runpy.run_module("skillsd", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which `multiprocessing` leaves out
