"""Where AppWorld's engine, our own task world and the official data lie. Reads files, imports nothing heavy."""

from __future__ import annotations

import json
import os
from pathlib import Path

from skillsd.cache import cache
from skillsd.errors import UserError

VERSION = "0.1.3.post1"
"""Of AppWorld: what is installed, and what the server and the world's builder are written for."""

SETUP = "skillsd envs setup appworld"
BUILDER = Path(__file__).parent / "world" / "build.py"
MARK = ".skillsd-ready"
"""File in the virtual environment that is written once all of AppWorld is installed and unpacked."""


def home() -> Path:
    """The folder of all that is kept; the virtual environment, the unpacked parts and the world lie in it."""
    return (cache() / f"appworld-{VERSION}").absolute()


def venv() -> Path:
    return home() / "venv"


def unpacked() -> Path:
    """AppWorld's ``$APPWORLD_CACHE``, so that the user's home folder stays clean."""
    return home() / "cache"


def installed() -> bool:
    """Whether AppWorld is installed and unpacked, and its interpreter is still there."""
    return (venv() / MARK).is_file() and _interpreter().exists()


def python() -> Path:
    """AppWorld's own interpreter.

    Raises:
        UserError: if AppWorld is not installed.
    """
    if not installed():
        raise UserError(f"AppWorld {VERSION} is not installed in {str(home())!r}: run `{SETUP}`")
    return _interpreter()


def builder_version() -> str:
    """Of which version the world is that the present sources build: a hash of them."""
    try:
        from skillsd.envs.appworld.world.build import version  # the standard library alone, until it builds
    except ImportError as error:
        raise UserError(f"the builder of AppWorld's tasks does not load: {error}. Install skillsd again") from error
    return version()


def world_folder() -> Path:
    """Where the world of the present builder belongs, whether it is there or not."""
    return home() / f"world-{builder_version()}"


def world() -> Path:
    """The root (what ``$APPWORLD_ROOT`` names) of our own task world, built by the present sources.

    Raises:
        UserError: if it is not there.
    """
    root = world_folder()
    if built_by(root) != builder_version():
        older = " (one of other sources is)" if any(home().glob("world-*/data/skillsd.json")) else ""
        raise UserError(f"AppWorld's tasks that skillsd builds are not in {str(root)!r}{older}: run `{SETUP}`")
    return root


def built_by(root: Path) -> str | None:
    """The version of the builder that made the data of `root`; None if it was not ours."""
    try:
        return str(json.loads((root / "data" / "skillsd.json").read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def official() -> Path | None:
    """The root that ``$APPWORLD_ROOT`` names, if it holds AppWorld's official data."""
    given = os.environ.get("APPWORLD_ROOT")
    root = Path(given).expanduser().absolute() if given else None
    return root if root and not why_not_official(root) else None


def why_not_official(root: Path) -> str | None:
    """What keeps `root` from being a folder with AppWorld's official data; None if it is one."""
    data = root / "data"
    if not data.is_dir():
        inside = all((root / name).exists() for name in ("version.txt", "tasks"))
        return f"the data folder itself: give the one above it, {str(root.parent)!r}" if inside else "without data/"
    if (data / "skillsd.json").exists():
        return "a world that skillsd built, not AppWorld's official data"
    needed = ("version.txt", "tasks", "base_dbs", "datasets/train.txt")
    missing = [f"data/{name}" for name in needed if not (data / name).exists()]
    return f"without {', '.join(missing)}: not AppWorld's official data, or not all of them" if missing else None


def _interpreter() -> Path:
    return venv() / "bin" / "python"
