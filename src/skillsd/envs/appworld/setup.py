"""`skillsd envs setup appworld`: AppWorld in an environment of its own, unpacked, and our task world built.

Each step leaves a mark when it has ended, so one that was interrupted is done again and one that is done costs nothing.
What AppWorld allows to pass on only encrypted is unpacked in the cache folder and nowhere else.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from skillsd.envs.appworld import paths
from skillsd.errors import UserError

REQUIREMENT = f"appworld=={paths.VERSION}"
BOUNDS = ("anyio<5", "click<9", "ipython<10", "pendulum<4", "trio<1")
"""Where AppWorld and its typer<0.17 name no upper bound: no later than the major release that was tried."""

OLDEST, NEWEST = (3, 11), (3, 13)
"""Pythons for AppWorld. For 3.14 its uvloop<0.22 was never built."""

ROOM = 400 << 20
"""Bytes that must be free to install: 230 MB stay, the rest is what pip downloads."""

_INSTALLED = ".skillsd-installed"  # before paths.MARK: pip has ended, nothing is unpacked yet
_STEPS = ("virtual environment", f"install {REQUIREMENT}", "unpack AppWorld", "build the task world")

_REMEDIES = {
    r"No space left|Disk quota": "Free 600 MB there, or set SKILLSD_CACHE to a folder that has them",
    r"Permission denied|Read-only file system": "Set SKILLSD_CACHE to a folder that you may write to",
    r"ensurepip|No module named '?venv": "This Python can't make virtual environments: install its package for that "
    "(Debian and Ubuntu: apt install python3-venv) or give another Python with --python",
    r"Failed building wheel|Failed to build|error: metadata-generation": "A package has nothing ready-made for this "
    "Python on this machine: give another Python with --python",
    r"resolution|[Cc]onnection|[Tt]imed? ?out|SSL|No matching distribution|Could not find a version": "pip found no "
    "index that has it: check the network, or name an index (PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS)",
    r"MemoryError|Killed": "It ran out of memory: try with more of it free",
}

Say = Callable[[str], None]


def setup(say: Say, *, data: Path | None = None, python: str | None = None) -> None:
    """Do what is not yet done, and say what is there.

    Args:
        say: gets a line at a time.
        data: a folder that should hold AppWorld's official data; only checked.
        python: the Python to make the environment with; by default the one that runs this.

    Raises:
        UserError: if `data` holds no official data, the Python does not fit, or a step fails.
    """
    data = data and data.expanduser()
    if data is not None and (wrong := paths.why_not_official(data)):
        raise UserError(f"--data is {str(data)!r}, {wrong}. Expected a folder with data/version.txt, data/tasks and "
                        f"data/datasets; to get it: {_download(data)}")  # fmt: skip
    home = paths.home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _alone(home / ".lock", say) as lock:
            say(f"AppWorld {paths.VERSION} in {home}")
            _install(say, lock, python)
            _build(say, lock)
    except OSError as error:
        raise UserError(
            f"can't set AppWorld up in {str(home)!r}: {error}. Set SKILLSD_CACHE to a folder that you may write to, "
            "with 600 MB to spare"
        ) from error
    _tell_data(say, data)


def _install(say: Say, lock: int, python: str | None) -> None:
    folder = paths.venv()
    if paths.installed():
        with_what = f", with the Python it was made with (for another: rm -r {folder})" if python else ""
        for number in (1, 2, 3):
            say(f"[{number}/4] {_STEPS[number - 1]}: there already{with_what if number == 1 else ''}")
        return
    interpreter = str(folder / "bin" / "python")
    if not ((folder / _INSTALLED).is_file() and Path(interpreter).exists()):
        base = _checked(python)
        if (free := shutil.disk_usage(paths.home()).free) < ROOM:
            raise UserError(f"AppWorld takes {ROOM >> 20} MB while it is installed, and {str(paths.home())!r} has "
                            f"{free >> 20} MB free. Set SKILLSD_CACHE to a folder with more")  # fmt: skip
        if folder.exists():
            shutil.rmtree(folder)  # half of one: pip would take its half packages for whole ones
        _run(say, 1, [base, "-I", "-m", "venv", str(folder)], lock, hint=base)
        bounds = folder / "bounds.txt"
        bounds.write_text("".join(f"{bound}\n" for bound in BOUNDS), encoding="utf-8")
        pip = [interpreter, "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        _run(say, 2, [*pip, "--prefer-binary", "-c", str(bounds), REQUIREMENT], lock, hint="half a minute, 230 MB")
        (folder / _INSTALLED).touch()
    _run(say, 3, [interpreter, "-I", "-m", "appworld.cli", "install"], lock)
    (folder / paths.MARK).touch()


def _build(say: Say, lock: int) -> None:
    root = paths.world_folder()
    if paths.built_by(root) == paths.builder_version():
        say(f"[4/4] {_STEPS[3]}: there already")
        return
    if root.exists():
        shutil.rmtree(root)
    workers = str(min(4, os.cpu_count() or 1))  # 250 MB each
    command = [str(paths.python()), str(paths.BUILDER), "--root", str(root), "--workers", workers]
    hint = "a minute or two, again when skillsd builds other tasks"
    _run(say, 4, command, lock, {"APPWORLD_ROOT": str(root)}, hint=hint, show=True)
    if (found := paths.built_by(root)) != paths.builder_version():
        raise UserError(
            f"{_at(4)} failed: what it built is of version {found!r}, expected {paths.builder_version()!r}. Were its "
            "sources changed meanwhile? Run the command again"
        )


def _tell_data(say: Say, given: Path | None) -> None:
    say(f"tasks of our own (real engine, self-made tasks): {paths.world()}")
    if root := given.absolute() if given else paths.official():
        say(f"official data: {root}; in a recipe: environment.options.root={root}")
        return
    named = os.environ.get("APPWORLD_ROOT")
    why = (
        f"$APPWORLD_ROOT is {named!r}, {paths.why_not_official(Path(named).expanduser())}"
        if named
        else "$APPWORLD_ROOT not set"
    )
    say(f"official data: not found ({why}). Only you can fetch them, under AppWorld's licence:")
    say(f"    {_download(Path('~/appworld'))}")
    say("    then set APPWORLD_ROOT to that folder, or environment.options.root in the recipe")


def _download(root: Path) -> str:
    # Told with --root: without it `appworld download` takes the working folder, whatever $APPWORLD_ROOT says.
    return f"{paths.venv()}/bin/appworld download data --root {root}"


def _checked(python: str | None) -> str:
    """The Python to make the environment with, if AppWorld runs on it."""
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
                f"--python is {python!r}, which is no Python that runs: give a path or a name like python3.12"
            )
    if not OLDEST <= version <= NEWEST:
        raise UserError(
            f"AppWorld {paths.VERSION} needs Python 3.{OLDEST[1]} to 3.{NEWEST[1]}, and {found} is "
            f"{'.'.join(map(str, version))}. Give one that fits, e.g. --python python3.12"
        )
    return str(found)


def _at(number: int) -> str:
    return f"setting AppWorld up: step {number}/4 ({_STEPS[number - 1]})"


def _run(
    say: Say,
    number: int,
    command: Sequence[str],
    lock: int,
    env: Mapping[str, str] | None = None,
    *,
    hint: str = "",
    show: bool = False,
) -> None:
    """Run a step's command, say how long it took, and put what it says into setup.log.

    It inherits `lock`: were this process killed, the next set-up waits until the orphan has ended, too.
    """
    say(f"[{number}/4] {_STEPS[number - 1]}{f' ({hint})' if hint else ''} ...")
    start = time.monotonic()
    log, said = paths.home() / "setup.log", deque[str](maxlen=60)
    inherited = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
    process = subprocess.Popen(
        command, cwd=paths.home(), env={**inherited, "APPWORLD_CACHE": str(paths.unpacked()), **(env or {})},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        pass_fds=(lock,), start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        with process.stdout, open(log, "w", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                said.append(line.rstrip())
                if show and line.strip():
                    say(f"      {line.rstrip()}")
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            process.wait()
    if code:
        raise UserError(_why(number, code, said, log))
    say(f"      done in {time.monotonic() - start:.0f} s")


_UNWANTED = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
"""Settings that would put packages elsewhere, or elsewhere's here."""


def _why(number: int, code: int, said: Sequence[str], log: Path) -> str:
    """Two lines: which step failed and with what last words; what to do."""
    words = [line.strip() for line in said if line.strip() and not re.match(r"\s*(WARNING|DEPRECATION|\[notice)", line)]
    words = [line for line in words if line.startswith("ERROR")] or words
    last = " ".join(words[-2:])[-400:] or "it said nothing"
    text = "Killed" if code == -9 else "\n".join(said)
    again = "Run the command again; the steps before this one are kept"
    remedy = next((do for pattern, do in _REMEDIES.items() if re.search(pattern, text)), again)
    ended = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
    return f"{_at(number)} failed, {ended}: {last}\n{remedy}. All that it said: {log}"


@contextlib.contextmanager
def _alone(path: Path, say: Say) -> Iterator[int]:
    import fcntl  # here: not on Windows, where AppWorld's time limits (SIGALRM) aren't either

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is setting AppWorld up: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
