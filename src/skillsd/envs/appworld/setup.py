"""`skillsd envs setup appworld`: installs AppWorld in its own virtual environment, and builds our task world.

AppWorld's protected parts, which may only be redistributed encrypted, are unpacked in the cache folder and nowhere
else.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from skillsd.envs.appworld import paths
from skillsd.envs.own_venv import Steps
from skillsd.envs.setups import Say, Setup
from skillsd.errors import UserError

_MORE_STEPS = ("unpack AppWorld", "build the task world")


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
    with paths.VENV.steps(say, *_MORE_STEPS) as steps:
        _unpack(steps, python)
        _build(steps)
    _report_data(say, data)


def _unpack(steps: Steps, python: str | None) -> None:
    if paths.installed():
        paths.VENV.skip(steps, python)
        steps.skip(3)
        return
    paths.VENV.install(steps, python)
    command = [str(paths.VENV.interpreter), "-I", "-m", "appworld.cli", "install"]
    steps.run(3, command, {"APPWORLD_CACHE": str(paths.unpacked())})
    (paths.venv() / paths.MARK).touch()


def _build(steps: Steps) -> None:
    root = paths.world_folder()
    if paths.built_by(root) == paths.builder_version():
        steps.skip(4)
        return
    if root.exists():
        shutil.rmtree(root)
    workers = str(min(4, os.cpu_count() or 1))  # each takes 250 MB
    command = [str(paths.python()), str(paths.BUILDER), "--root", str(root), "--workers", workers]
    hint = "one to two minutes; repeated when skillsd's tasks change"
    variables = {"APPWORLD_CACHE": str(paths.unpacked()), "APPWORLD_ROOT": str(root)}
    steps.run(4, command, variables, hint=hint, show=True)
    if (found := paths.built_by(root)) != paths.builder_version():
        raise UserError(
            f"{steps.at(4)} failed: it built version {found!r}, expected {paths.builder_version()!r}. Did the sources "
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


def _done() -> bool:
    return paths.installed() and paths.built_by(paths.world_folder()) == paths.builder_version()


SETUP = Setup("AppWorld's engine and our own tasks (two to three minutes, 400 MB)", _done, setup)
