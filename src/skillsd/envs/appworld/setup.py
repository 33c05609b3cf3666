"""`skillsd envs setup appworld`: installs AppWorld in its own virtual environment, and builds our task world.

Each step leaves a marker when it completes: interrupted steps are repeated, completed ones are skipped. AppWorld's
protected parts, which may only be redistributed encrypted, are unpacked in the cache folder and nowhere else.
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
"""Upper bounds for dependencies that AppWorld (or its typer<0.17) leaves open: the major releases tested."""

OLDEST, NEWEST = (3, 11), (3, 13)
"""Python versions that AppWorld supports. Its uvloop<0.22 has no wheels for 3.14."""

REQUIRED_BYTES = 400 << 20
"""Free disk space required to install: 230 MB for the installation, the rest for pip's downloads."""

_INSTALLED = ".skillsd-installed"  # written when pip is done; paths.MARK follows after unpacking
_STEPS = ("virtual environment", f"install {REQUIREMENT}", "unpack AppWorld", "build the task world")

_REMEDIES = {
    r"No space left|Disk quota": "Free 600 MB there, or set SKILLSD_CACHE to a folder that has them",
    r"Permission denied|Read-only file system": "Set SKILLSD_CACHE to a folder that you may write to",
    r"ensurepip|No module named '?venv": "This Python can't create virtual environments: install its venv package "
    "(Debian and Ubuntu: apt install python3-venv) or give another Python with --python",
    r"Failed building wheel|Failed to build|error: metadata-generation": "A package has no wheel for this Python on "
    "this machine: give another Python with --python",
    r"resolution|[Cc]onnection|[Tt]imed? ?out|SSL|No matching distribution|Could not find a version": "pip can't "
    "download it: check the network, or set an index (PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS)",
    r"MemoryError|Killed": "It ran out of memory: free some and run the command again",
}

Say = Callable[[str], None]


def setup(say: Say, *, data: Path | None = None, python: str | None = None) -> None:
    """Run the steps that are not done yet, and report the result.

    Args:
        say: receives one line of output at a time.
        data: a folder with AppWorld's official data; it is only checked.
        python: the Python for the virtual environment; default: the running one.

    Raises:
        UserError: if `data` has no official data, the Python is not supported, or a step fails.
    """
    data = data and data.expanduser()
    if data is not None and (wrong := paths.why_not_official(data)):
        raise UserError(f"--data is {str(data)!r}, {wrong}. Expected a folder with data/version.txt, data/tasks and "
                        f"data/datasets; to get it: {_download(data)}")  # fmt: skip
    home = paths.home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _exclusive(home / ".lock", say) as lock:
            say(f"AppWorld {paths.VERSION} in {home}")
            _install(say, lock, python)
            _build(say, lock)
    except OSError as error:
        raise UserError(
            f"can't set up AppWorld in {str(home)!r}: {error}. Set SKILLSD_CACHE to a writable folder with 600 MB free"
        ) from error
    _report_data(say, data)


def _install(say: Say, lock: int, python: str | None) -> None:
    folder = paths.venv()
    if paths.installed():
        ignored = f"; --python has no effect on it (to change it: rm -r {folder})" if python else ""
        for number in (1, 2, 3):
            say(f"[{number}/4] {_STEPS[number - 1]}: already done{ignored if number == 1 else ''}")
        return
    interpreter = str(folder / "bin" / "python")
    if not ((folder / _INSTALLED).is_file() and Path(interpreter).exists()):
        base = _checked(python)
        if (free := shutil.disk_usage(paths.home()).free) < REQUIRED_BYTES:
            raise UserError(f"installing AppWorld takes {REQUIRED_BYTES >> 20} MB, but {str(paths.home())!r} has "
                            f"{free >> 20} MB free. Set SKILLSD_CACHE to a folder with more")  # fmt: skip
        if folder.exists():
            shutil.rmtree(folder)  # incomplete: pip would treat partly installed packages as installed
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
        say(f"[4/4] {_STEPS[3]}: already done")
        return
    if root.exists():
        shutil.rmtree(root)
    workers = str(min(4, os.cpu_count() or 1))  # each takes 250 MB
    command = [str(paths.python()), str(paths.BUILDER), "--root", str(root), "--workers", workers]
    hint = "one to two minutes; repeated when skillsd's tasks change"
    _run(say, 4, command, lock, {"APPWORLD_ROOT": str(root)}, hint=hint, show=True)
    if (found := paths.built_by(root)) != paths.builder_version():
        raise UserError(
            f"{_at(4)} failed: it built version {found!r}, expected {paths.builder_version()!r}. Did the sources "
            "change in the meantime? Run the command again"
        )


def _report_data(say: Say, given: Path | None) -> None:
    say(f"our own tasks (on the original engine): {paths.world()}")
    if root := given.absolute() if given else paths.official():
        say(f"official data: {root}; in a recipe: environment.options.root={root}")
        return
    named = os.environ.get("APPWORLD_ROOT")
    why = (
        f"$APPWORLD_ROOT is {named!r}, {paths.why_not_official(Path(named).expanduser())}"
        if named
        else "$APPWORLD_ROOT is not set"
    )
    say(f"official data: not found ({why}). To download them yourself, under AppWorld's licence:")
    say(f"    {_download(Path('~/appworld'))}")
    say("    then set APPWORLD_ROOT to that folder, or environment.options.root in the recipe")


def _download(root: Path) -> str:
    # With --root: without it, `appworld download` uses the working folder and ignores $APPWORLD_ROOT.
    return f"{paths.venv()}/bin/appworld download data --root {root}"


def _checked(python: str | None) -> str:
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
    if not OLDEST <= version <= NEWEST:
        raise UserError(
            f"AppWorld {paths.VERSION} needs Python 3.{OLDEST[1]} to 3.{NEWEST[1]}, but {found} is "
            f"{'.'.join(map(str, version))}. Give a supported one, e.g. --python python3.12"
        )
    return str(found)


def _at(number: int) -> str:
    return f"AppWorld set-up: step {number}/4 ({_STEPS[number - 1]})"


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
    """Run a step's command, report its duration, and write its output to setup.log.

    The command inherits `lock`: if this process is killed, the next set-up waits until the orphan has ended.
    """
    say(f"[{number}/4] {_STEPS[number - 1]}{f' ({hint})' if hint else ''} ...")
    start = time.monotonic()
    log, output = paths.home() / "setup.log", deque[str](maxlen=60)
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
                output.append(line.rstrip())
                if show and line.strip():
                    say(f"      {line.rstrip()}")
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # including its children
            process.wait()
    if code:
        raise UserError(_failure(number, code, output, log))
    say(f"      done in {time.monotonic() - start:.0f} s")


_UNWANTED = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
"""Variables that would make the step use packages from elsewhere, or install them elsewhere."""


def _failure(number: int, code: int, output: Sequence[str], log: Path) -> str:
    """Two lines: the failed step with the end of its output, and what to do."""
    noise = r"\s*(WARNING|DEPRECATION|\[notice)"
    lines = [line.strip() for line in output if line.strip() and not re.match(noise, line)]
    lines = [line for line in lines if line.startswith("ERROR")] or lines
    last = " ".join(lines[-2:])[-400:] or "no output"
    text = "Killed" if code == -9 else "\n".join(output)
    again = "Run the command again; completed steps are kept"
    remedy = next((do for pattern, do in _REMEDIES.items() if re.search(pattern, text)), again)
    ended = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
    return f"{_at(number)} failed, {ended}: {last}\n{remedy}. Full output: {log}"


@contextlib.contextmanager
def _exclusive(path: Path, say: Say) -> Iterator[int]:
    """Hold a lock on the file, waiting for other processes; yields its descriptor."""
    import fcntl  # imported here: missing on Windows, where AppWorld itself (SIGALRM) doesn't run either

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is setting up AppWorld: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
