"""A run's folder: one process at a time trains in it, and it keeps the tracebacks of faults in the user's code."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from skillsd.errors import UserError
from skillsd.files.lock import locked
from skillsd.files.write import WriteFailedError
from skillsd.report.writer import EVALUATIONS, METRICS, TENSORBOARD, TRAJECTORIES, read
from skillsd.runs.build import BANK
from skillsd.training import checkpoint
from skillsd.user_code import FaultLog, logged_in

CONFIG = "config.yaml"
LOCK = ".lock"
ERRORS = "errors.log"
"""Faults in the user's code, with tracebacks."""

EARLY = (BANK, "manifest.json", ".manifest.json.partial", TENSORBOARD, "wandb", f".{CONFIG}.partial")
"""Names (or their beginnings) of files that are written before `CONFIG`. Only with `CONFIG` is a folder a run's."""


@contextmanager
def in_use(folder: Path, on_note: Callable[[str], None]) -> Iterator[None]:
    """Train in a folder, which is created if missing, and removed again if it stays empty.

    Faults in the user's code are noted, and recorded in full in `ERRORS`.

    Raises:
        UserError: if another process trains in it, or a file can't be written.
    """
    new = not folder.exists()
    try:
        with (
            locked(
                folder / LOCK, f"the run {str(folder)!r}", "wait for it or stop it, or give another folder with --out"
            ),
            logged_in(FaultLog(folder / ERRORS, on_note)),
        ):
            yield
    except WriteFailedError as error:
        if not (folder / CONFIG).exists():
            raise
        raise UserError(
            f"{error.problem}. Checkpoints are complete: {error.remedy}, then resume with --resume"
        ) from error
    finally:
        if new:
            with suppress(OSError):  # not empty
                folder.rmdir()


def never_began(folder: Path) -> bool:
    """Whether a run's folder has neither a finished iteration nor a checkpoint: nothing is lost if it starts anew."""
    return not checkpoint.iterations(folder) and not read(folder / METRICS)


def remove_early_files(folder: Path) -> None:
    """Delete the `EARLY` files."""
    _remove(folder, EARLY)


def clear(folder: Path) -> None:
    """Delete the files of a run that `never_began`."""
    _remove(folder, (CONFIG, *EARLY, METRICS, EVALUATIONS, TRAJECTORIES, ERRORS))


def _remove(folder: Path, names: tuple[str, ...]) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(names):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
