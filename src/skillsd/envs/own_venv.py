"""A virtual environment of its own for packages that can't share ours, in the cache folder, for `skillsd envs setup`.

Each step leaves a marker when it completes: interrupted steps are repeated, completed ones are skipped. Only one
process sets an environment up at a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from skillsd.cache import cache
from skillsd.envs.setups import Say
from skillsd.errors import UserError

_MARK = ".skillsd-installed"  # written when pip is done; its content are the requirements

_REMEDIES = {
    r"No space left|Disk quota": "Free {megabytes} MB there, or set SKILLSD_CACHE to a folder that has them",
    r"Permission denied|Read-only file system": "Set SKILLSD_CACHE to a folder that you may write to",
    r"ensurepip|No module named '?venv": "This Python can't create virtual environments: install its venv package "
    "(Debian and Ubuntu: apt install python3-venv) or give another Python with --python",
    r"Failed building wheel|Failed to build|error: metadata-generation": "A package has no wheel for this Python on "
    "this machine: give another Python with --python",
    r"resolution|[Cc]onnection|[Tt]imed? ?out|SSL|No matching distribution|Could not find a version": "pip can't "
    "download it: check the network, or set an index (PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS)",
    r"MemoryError|Killed": "It ran out of memory: free some and run the command again",
}

_UNWANTED = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
"""Variables that would make a step use packages from elsewhere, or install them elsewhere."""


@dataclass(frozen=True)
class OwnVenv:
    """Packages in a virtual environment of their own.

    Attributes:
        title: what is installed, for messages; e.g. ``AppWorld 0.1.3``.
        folder: name of its folder in the cache folder.
        command: the command that sets it up.
        requirements: pip's requirements.
        bounds: constraints on the versions of their dependencies.
        oldest, newest: the Python versions that the packages support.
        megabytes: free disk space required to install.
        hint: what pip takes, e.g. ``half a minute, 230 MB``.
    """

    title: str
    folder: str
    command: str
    requirements: tuple[str, ...]
    bounds: tuple[str, ...] = ()
    oldest: tuple[int, int] = (3, 11)
    newest: tuple[int, int] = (3, 14)
    megabytes: int = 500
    hint: str = ""

    @property
    def home(self) -> Path:
        return (cache() / self.folder).absolute()

    @property
    def venv(self) -> Path:
        return self.home / "venv"

    @property
    def interpreter(self) -> Path:
        """Where the environment's Python is, once it is installed."""
        return self.venv / "bin" / "python"

    def installed(self) -> bool:
        """Whether the requirements are installed, and the interpreter still exists."""
        try:
            content = (self.venv / _MARK).read_text(encoding="utf-8")
        except OSError:
            return False
        return content == self._content and self.interpreter.exists()

    def python(self) -> Path:
        """The environment's Python.

        Raises:
            UserError: if it is not installed.
        """
        if not self.installed():
            raise UserError(f"{self.title} is not installed in {str(self.home)!r}: run `{self.command}`")
        return self.interpreter

    def setup(self, say: Say, *, python: str | None = None) -> None:
        """Install what is not installed yet: the function of a `Setup` that needs no further steps.

        Raises:
            UserError: if the Python is not supported, or a step fails.
        """
        with self.steps(say) as steps:
            self.install(steps, python)

    @contextlib.contextmanager
    def steps(self, say: Say, *more: str) -> Iterator[Steps]:
        """The set-up's steps, while no other process is at them.

        Args:
            more: names of the steps that follow the two of `install`.

        Raises:
            UserError: for an error of the file system.
        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with _exclusive(self.home / ".lock", self.title, say) as lock:
                say(f"{self.title} in {self.home}")
                names = ("virtual environment", f"install {' '.join(self.requirements)}", *more)
                yield Steps(self, names, say, lock)
        except OSError as error:
            raise UserError(
                f"can't set up {self.title} in {str(self.home)!r}: {error}. Set SKILLSD_CACHE to a writable folder "
                f"with {self.megabytes} MB free"
            ) from error

    def install(self, steps: Steps, python: str | None) -> None:
        """The first two steps: the virtual environment and the packages.

        Args:
            python: the Python for the virtual environment; default: the running one.
        """
        if self.installed():
            self.skip(steps, python)
            return
        base = self._checked(python)
        if (free := shutil.disk_usage(self.home).free >> 20) < self.megabytes:
            raise UserError(f"installing {self.title} takes {self.megabytes} MB, but {str(self.home)!r} has "
                            f"{free} MB free. Set SKILLSD_CACHE to a folder with more")  # fmt: skip
        if self.venv.exists():
            shutil.rmtree(self.venv)  # incomplete: pip would treat partly installed packages as installed
        steps.run(1, [base, "-I", "-m", "venv", str(self.venv)], hint=base)
        bounds = self.venv / "bounds.txt"
        bounds.write_text("".join(f"{bound}\n" for bound in self.bounds), encoding="utf-8")
        pip = [str(self.interpreter), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        steps.run(2, [*pip, "--prefer-binary", "-c", str(bounds), *self.requirements], hint=self.hint)
        (self.venv / _MARK).write_text(self._content, encoding="utf-8")

    def skip(self, steps: Steps, python: str | None) -> None:
        """Report that the first two steps have been done before."""
        steps.skip(1, f"; --python has no effect on it (to change it: rm -r {self.venv})" if python else "")
        steps.skip(2)

    @property
    def _content(self) -> str:
        return "\n".join((*self.requirements, *self.bounds))

    def _checked(self, python: str | None) -> str:
        """The path of the Python for the virtual environment, after checking its version."""
        found = shutil.which(Path(python).expanduser()) if python else sys.executable
        version: tuple[int, ...] = sys.version_info[:2]
        if python:
            ask = [str(found), "-I", "-c", "import sys; print(*sys.version_info[:2])"]
            try:
                answer = subprocess.run(ask, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
                version = tuple(int(part) for part in answer.stdout.split())
            except (OSError, ValueError, subprocess.TimeoutExpired):
                version = ()
            if len(version) != 2:
                raise UserError(
                    f"--python is {python!r}, which is not a working Python: give a path or a name like python3.12"
                )
        if not self.oldest <= version <= self.newest:
            oldest, newest = (".".join(map(str, bound)) for bound in (self.oldest, self.newest))
            raise UserError(
                f"{self.title} needs Python {oldest} to {newest}, but {found} is {'.'.join(map(str, version))}. Give a "
                "supported one, e.g. --python python3.12"
            )
        return str(found)


class Steps:
    """The numbered steps of a set-up: each runs a command, and reports it. Made by `OwnVenv.steps`."""

    def __init__(self, of: OwnVenv, names: Sequence[str], say: Say, lock: int) -> None:
        self._of, self._names, self._say, self._lock = of, names, say, lock

    def at(self, number: int) -> str:
        """A step, for messages."""
        return f"{self._of.title} set-up: step {number}/{len(self._names)} ({self._names[number - 1]})"

    def skip(self, number: int, note: str = "") -> None:
        """Report that a step has been done before."""
        self._say(f"[{number}/{len(self._names)}] {self._names[number - 1]}: already done{note}")

    def run(
        self,
        number: int,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        hint: str = "",
        show: bool = False,
    ) -> None:
        """Run a step's command, report its duration, and write its output to setup.log.

        The command inherits the lock: if this process is killed, the next set-up waits until the orphan has ended.

        Args:
            number: of the step, from 1.
            env: variables to add to the environment.
            hint: what it takes.
            show: also show the command's output.

        Raises:
            UserError: if the command fails.
        """
        self._say(f"[{number}/{len(self._names)}] {self._names[number - 1]}{f' ({hint})' if hint else ''} ...")
        start = time.monotonic()
        log, output = self._of.home / "setup.log", deque[str](maxlen=60)
        inherited = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
        process = subprocess.Popen(
            command, cwd=self._of.home, env={**inherited, **(env or {})},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            pass_fds=(self._lock,), start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            with process.stdout, open(log, "w", encoding="utf-8") as file:
                for line in process.stdout:
                    file.write(line)
                    output.append(line.rstrip())
                    if show and line.strip():
                        self._say(f"      {line.rstrip()}")
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # including its children
                process.wait()
        if code:
            raise UserError(self._failure(number, code, output, log))
        self._say(f"      done in {time.monotonic() - start:.0f} s")

    def _failure(self, number: int, code: int, output: Sequence[str], log: Path) -> str:
        """Two lines: the failed step with the end of its output, and what to do."""
        noise = r"\s*(WARNING|DEPRECATION|\[notice)"
        lines = [line.strip() for line in output if line.strip() and not re.match(noise, line)]
        lines = [line for line in lines if line.startswith("ERROR")] or lines
        last = " ".join(lines[-2:])[-400:] or "no output"
        text = "Killed" if code == -9 else "\n".join(output)
        again = "Run the command again; completed steps are kept"
        remedy = next((do for pattern, do in _REMEDIES.items() if re.search(pattern, text)), again)
        remedy = remedy.format(megabytes=self._of.megabytes)
        ended = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return f"{self.at(number)} failed, {ended}: {last}\n{remedy}. Full output: {log}"


@contextlib.contextmanager
def _exclusive(path: Path, title: str, say: Say) -> Iterator[int]:
    """Hold a lock on the file, waiting for other processes; yields its descriptor."""
    import fcntl  # imported here: missing on Windows

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is setting up {title}: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
