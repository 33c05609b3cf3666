"""Work that is done in processes of its own, as many at once as there are cores: started, watched, stopped together."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from skillsd.config import RunConfig
from skillsd.errors import UserError
from skillsd.report.progress import Bars, training_note
from skillsd.report.writer import METRICS
from skillsd.sweeps.plan import Cell, Sweep, remember
from skillsd.sweeps.state import steps

POLL_SECONDS = 0.3
TAIL_LINES = 12

Progress = tuple[float, float, str]
"""Done, of how much, and a note."""


@dataclass(frozen=True)
class Job:
    """Commands to run one after the other, with what they say in one log.

    Attributes:
        progress: asked while the job runs, with the number of its commands that are done.
    """

    name: str
    commands: Sequence[Sequence[str]]
    log: Path
    progress: Callable[[int], Progress] = lambda step: (step, 0, "")


@dataclass(frozen=True)
class Failure:
    """A job that did not get to its end."""

    name: str
    code: int
    log: Path

    @property
    def tail(self) -> str:
        """The last lines of what its last command said."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        begin = max((i + 1 for i, line in enumerate(lines) if line.startswith("$ ")), default=0)
        return "\n".join(lines[begin:][-TAIL_LINES:])

    def __str__(self) -> str:
        return f"{self.name} failed (exit code {self.code}); the end of {self.log}:\n{self.tail}"


class _Running:
    def __init__(self, job: Job, lock: IO[str] | None) -> None:
        self.job, self.step, self._lock = job, 0, lock
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = list(self.job.commands[self.step])
        self.job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.job.log, "ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            # A process that outlives this one keeps the folder's lock.
            kept = (self._lock.fileno(),) if self._lock else ()
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, pass_fds=kept
            )

    def ended(self) -> int | None:
        """The exit code once all commands are done or one has failed; the next command is started here."""
        code = self.process.poll()
        if code != 0:
            return code
        self.step += 1
        if self.step == len(self.job.commands):
            return 0
        self.process = self._start()
        return None


def run_jobs(
    jobs: Sequence[Job],
    console: Console,
    *,
    at_once: int,
    what: str,
    finished: int = 0,
    lock: IO[str] | None = None,
) -> list[Failure]:
    """Run all of them; one that fails does not stop the others.

    Ctrl-C, or SIGTERM, is passed on to the processes, which save what they have, and waits for them.

    Args:
        what: the name of the bar over all of them.
        finished: how many others were done before.
        lock: a locked file that the processes keep open.

    Returns:
        Those that failed, in the order of `jobs`.
    """
    waiting, running, failures = list(jobs), list[_Running](), dict[str, Failure]()
    bars, total = Bars(console), finished + len(jobs)
    done = finished
    with _terminated_like_interrupted(), bars.shown():
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(_Running(waiting.pop(0), lock))
                time.sleep(POLL_SECONDS)
                part = 0.0
                for one in list(running):
                    code = one.ended()
                    amount, of, note = one.job.progress(one.step)
                    if code is None:
                        bars.update(one.job.name, amount, of, note)
                        part += min(0.99, amount / of) if of else 0.0
                        continue
                    running.remove(one)
                    bars.drop(one.job.name)
                    done += 1
                    if code:
                        failures[one.job.name] = Failure(one.job.name, code, one.job.log)
                        bars.print(f"  {one.job.name} failed; the others go on")
                bars.update(what, done + part, total, f"{len(failures)} failed" if failures else "")
        except KeyboardInterrupt:
            # A terminal's Ctrl-C reached the processes as well; SIGTERM tells those that it did not. They save and end.
            bars.print("stopping; everything so far is kept: the same command goes on from there")
            _stop(running)
            raise
        finally:
            _stop(running)
    return [failures[job.name] for job in jobs if job.name in failures]


def run_cells(
    sweep: Sweep, console: Console, *, jobs: int | None = None, leave_out: Collection[str] = ()
) -> list[Failure]:
    """Train and evaluate what is missing of a sweep.

    Args:
        jobs: processes at once; as many as the cores give threads to, if not said.
        leave_out: names of cells to leave as they are.

    Raises:
        UserError: if another process works in the sweep's folder, or a cell's folder holds another run.
    """
    with locked(sweep.out) as lock:
        remember(sweep)
        cells = [cell for cell in sweep.cells if cell.name not in leave_out]
        todo = [(cell, commands) for cell in cells if (commands := steps(sweep, cell))]
        work = [Job(cell.name, commands, cell.log, _watch(sweep, cell, commands)) for cell, commands in todo]
        return run_jobs(
            work,
            console,
            at_once=jobs or jobs_at_once(sweep.config),
            what="cells",
            finished=len(cells) - len(work),
            lock=lock,
        )


def jobs_at_once(config: RunConfig) -> int:
    """How many runs fit on the cores side by side."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (config.model.threads or cores))


@contextmanager
def locked(folder: Path) -> Iterator[IO[str] | None]:
    """Nobody else works in `folder` meanwhile.

    Raises:
        UserError: if somebody does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            import fcntl
        except ImportError:  # not on this system
            yield None
            return
        lock = stack.enter_context(open(folder / ".lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process works in {str(folder)!r}: wait for it, or stop it") from error
        yield lock


def last_record(path: Path) -> Mapping[str, Any] | None:
    """The last whole record of a .jsonl file, without reading all of it."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - (1 << 16)))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record: Mapping[str, Any] = json.loads(line)
        except ValueError:
            continue
        return record
    return None


def _watch(sweep: Sweep, cell: Cell, commands: Sequence[Sequence[str]]) -> Callable[[int], Progress]:
    trains = "train" in commands[0][:4]

    def progress(step: int) -> Progress:
        if not trains or step > 0:
            trained = float(cell.iterations[-1]) if cell.trained else 0.0
            return (trained, trained or 1, f"evaluating on {sweep.split}")
        last = last_record(cell.folder / METRICS)
        if last is None:
            return (0, cell.iterations[-1], "starting")
        return (last["iteration"], cell.iterations[-1], training_note(last))

    return progress


def _stop(running: Sequence[_Running]) -> None:
    for one in running:
        if one.process.poll() is None:
            one.process.terminate()
    for one in running:
        one.process.wait()


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, as when a machine is pre-empted, ends us as Ctrl-C does; else our processes would be left alone."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
