"""Run commands in parallel processes: start, watch and stop them together."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from skillsd.config import RunConfig
from skillsd.errors import UserError
from skillsd.report.progress import Bars, training_note
from skillsd.report.writer import METRICS
from skillsd.sweeps.plan import Cell, Sweep, remember
from skillsd.sweeps.processes import Process, start
from skillsd.sweeps.state import steps
from skillsd.training.health import symptoms

POLL_SECONDS = 0.3
TAIL_LINES = 12

Progress = tuple[float, float, str]
"""Done, total, and a note."""


@dataclass(frozen=True)
class Job:
    """Commands to run one after the other, with a common log.

    Attributes:
        log: file that their output is appended to.
        progress: number of finished commands -> progress; called while the job runs.
    """

    name: str
    commands: Sequence[Sequence[str]]
    log: Path
    progress: Callable[[int], Progress] = lambda step: (step, 0, "")


@dataclass(frozen=True)
class Failure:
    """A job with a failed command."""

    name: str
    code: int
    log: Path

    @property
    def tail(self) -> str:
        """The last lines of its last command's output."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        begin = max((i + 1 for i, line in enumerate(lines) if line.startswith("$ ")), default=0)
        return "\n".join(lines[begin:][-TAIL_LINES:])

    def __str__(self) -> str:
        return f"{self.name} failed (exit code {self.code}). End of {self.log}:\n{self.tail}"


class _Running:
    def __init__(self, job: Job, lock: IO[str] | None) -> None:
        self.job, self.step, self._lock = job, 0, lock
        self.process = self._start()

    def _start(self) -> Process:
        return start(self.job.commands[self.step], self.job.log, self._lock)

    def ended(self) -> int | None:
        """Start the next command if the current one is done. Returns the exit code at the end, or after a failure."""
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
    """Run all jobs; a failed job does not stop the others.

    On Ctrl-C or SIGTERM the processes are stopped, which lets them save their state, and waited for.

    Args:
        at_once: maximum number of parallel jobs.
        what: name of the overall progress bar.
        finished: number of jobs that were done before, for that bar.
        lock: a locked file for the processes to inherit.

    Returns:
        The failures, in the order of `jobs`.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    waiting, running, failures = list(jobs), list[_Running](), dict[str, Failure]()
    bars, total = Bars(console), finished + len(jobs)
    done = finished
    with _sigterm_interrupts(), bars.shown():
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
                        bars.print(f"  {one.job.name} failed; the others continue")
                bars.update(what, done + part, total, f"{len(failures)} failed" if failures else "")
        except KeyboardInterrupt:
            # Ctrl-C in a terminal also reaches the children. `_stop` sends SIGTERM for the cases where it does not.
            bars.print("stopping. Everything so far is kept: the same command resumes from there")
            _stop(running)
            raise
        finally:
            _stop(running)
    return [failures[job.name] for job in jobs if job.name in failures]


def run_cells(
    sweep: Sweep, console: Console, *, jobs: int | None = None, leave_out: Collection[str] = ()
) -> list[Failure]:
    """Train and evaluate the missing cells of a sweep.

    Args:
        jobs: maximum number of parallel processes. Default: `jobs_at_once`.
        leave_out: names of cells to skip.

    Raises:
        UserError: if another process uses the sweep's folder, or a cell's folder contains a different run.
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
    """Number of runs that the cores have threads for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (config.model.threads or cores))


@contextmanager
def locked(folder: Path) -> Iterator[IO[str] | None]:
    """Hold an exclusive lock on `folder`.

    Raises:
        UserError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            import fcntl
        except ImportError:  # not available on Windows
            yield None
            return
        lock = stack.enter_context(open(folder / ".lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is using {str(folder)!r}: wait for it, or stop it") from error
        yield lock


def last_record(path: Path) -> Mapping[str, Any] | None:
    """The last complete record of a .jsonl file, without reading the whole file."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - (1 << 16)))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError, RecursionError):
            record: object = json.loads(line)
            if isinstance(record, dict):
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
        return (last["iteration"], cell.iterations[-1], training_note(last, symptoms(last)))

    return progress


def _stop(running: Sequence[_Running]) -> None:
    for one in running:
        if one.process.poll() is None:
            one.process.terminate()
    for one in running:
        one.process.wait()


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM (e.g. on pre-emption) like Ctrl-C, so that the child processes are stopped as well."""

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
