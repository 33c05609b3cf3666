"""Locations of AppWorld's engine, our own task world and the official data. Cheap to import."""

from __future__ import annotations

import json
import os
from pathlib import Path

from skillsd.envs.own_venv import OwnVenv
from skillsd.errors import UserError

VERSION = "0.1.3.post1"
"""The version of AppWorld that is installed, and that the server and the world builder are written for."""

SETUP = "skillsd envs setup appworld"

VENV = OwnVenv(
    title=f"AppWorld {VERSION}",
    folder=f"appworld-{VERSION}",
    command=SETUP,
    requirements=(f"appworld=={VERSION}",),
    # For dependencies that AppWorld (or its typer<0.17) leaves open: the major releases tested.
    bounds=("anyio<5", "click<9", "ipython<10", "pendulum<4", "trio<1"),
    newest=(3, 13),  # its uvloop<0.22 has no wheels for 3.14
    megabytes=600,
    hint="half a minute, 230 MB",
)

BUILDER = Path(__file__).parent / "world" / "build.py"
MARK = ".skillsd-ready"
"""Marker file in the virtual environment, written once AppWorld is installed and unpacked."""


def home() -> Path:
    """The folder with the virtual environment, the unpacked parts and the task world."""
    return VENV.home


def venv() -> Path:
    return VENV.venv


def unpacked() -> Path:
    """The folder used as ``$APPWORLD_CACHE``, instead of AppWorld's default in the user's home."""
    return home() / "cache"


def installed() -> bool:
    """Whether AppWorld is installed and unpacked, and its interpreter still exists."""
    return (venv() / MARK).is_file() and VENV.interpreter.exists()


def python() -> Path:
    """AppWorld's interpreter.

    Raises:
        UserError: if AppWorld is not installed.
    """
    if not installed():
        raise UserError(f"AppWorld {VERSION} is not installed in {str(home())!r}: run `{SETUP}`")
    return VENV.interpreter


def python_version() -> str:
    """The version of AppWorld's interpreter, whose outputs depend on it; empty if AppWorld is not installed."""
    try:
        lines = (venv() / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition("=")[2].strip() for line in lines if line.startswith("version")), "")


def builder_version() -> str:
    """Version of the task world that the current sources build: a hash of the sources."""
    try:
        from skillsd.envs.appworld.world.build import version  # needs only the standard library until it builds
    except ImportError as error:
        raise UserError(f"can't import the builder of AppWorld's tasks: {error}. Reinstall skillsd") from error
    return version()


def world_folder() -> Path:
    """The folder for the current builder's task world, which may not exist yet."""
    return home() / f"world-{builder_version()}"


def world() -> Path:
    """The root folder (in the sense of ``$APPWORLD_ROOT``) of our own task world, built by the current sources.

    Raises:
        UserError: if it has not been built.
    """
    root = world_folder()
    if built_by(root) != builder_version():
        older = " (one built by other sources is)" if any(home().glob("world-*/data/skillsd.json")) else ""
        raise UserError(f"the task world for AppWorld is not in {str(root)!r}{older}: run `{SETUP}`")
    return root


def built_by(root: Path) -> str | None:
    """The builder version of the data in `root`; None if skillsd didn't build them."""
    try:
        return str(json.loads((root / "data" / "skillsd.json").read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def official() -> Path | None:
    """The folder in ``$APPWORLD_ROOT``, if it contains AppWorld's official data; else None."""
    given = os.environ.get("APPWORLD_ROOT")
    root = Path(given).expanduser().absolute() if given else None
    return root if root and not why_not_official(root) else None


def why_not_official(root: Path) -> str | None:
    """Why `root` is not a folder with AppWorld's official data; None if it is one."""
    data = root / "data"
    if not data.is_dir():
        inside = all((root / name).exists() for name in ("version.txt", "tasks"))
        return f"the data folder itself: give its parent, {str(root.parent)!r}" if inside else "without data/"
    if (data / "skillsd.json").exists():
        return "a task world built by skillsd, not AppWorld's official data"
    needed = ("version.txt", "tasks", "base_dbs", "datasets/train.txt")
    missing = [f"data/{name}" for name in needed if not (data / name).exists()]
    return f"without {', '.join(missing)}: not AppWorld's official data, or incomplete" if missing else None
