"""Checkpoints: folders that are complete or absent. Each is written under another name, fsynced, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from skillsd.engines.base import Engine, Learner
from skillsd.errors import UserError
from skillsd.training.run import Run

_NAME = re.compile(r"step-(\d+)")
_KEYS = {"iteration", "totals", "visits", "pending_summaries", "summary_stats", "best_successes"}
"""Keys of state.json."""


async def save(run: Run) -> Path:
    """Write ``checkpoints/step-N``: weights, optimiser, random state, task visits, bank with UCB's counts, pending
    summaries and successes to imitate. Deletes checkpoints beyond ``checkpoint.keep``."""
    parent = run.folder / "checkpoints"
    parent.mkdir(exist_ok=True)
    target = parent / f"step-{run.iteration}"
    aside = parent / f".step-{run.iteration}.partial"
    for left in parent.glob(".step-*.partial"):  # of a process that was killed while writing
        shutil.rmtree(left)
    aside.mkdir()
    await run.learner.save_state(aside)
    run.bank.snapshot(aside / "skills.sqlite")
    state = {
        "iteration": run.iteration,
        "totals": run.totals,
        "visits": run.visits,
        "pending_summaries": run.summaries.pending() if run.summaries else [],
        "summary_stats": run.summaries.stats() if run.summaries else {},
        "best_successes": run.best.state() if run.best else {},
    }
    (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
    _sync(aside)
    if target.exists():  # the same step again, after a resume: identical
        shutil.rmtree(aside)
        return target
    aside.rename(target)
    _sync_folder(parent)
    for old in _all(run.folder)[: -run.config.checkpoint.keep]:
        going = parent / f".{old.name}.partial"
        old.rename(going)  # a half-deleted folder must not look like a checkpoint
        shutil.rmtree(going)
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder; None if there is none."""
    found = _all(folder)
    return found[-1] if found else None


def iterations(folder: Path) -> list[int]:
    """The iterations with a checkpoint, ascending."""
    return [number(path) for path in _all(folder)]


def number(path: Path) -> int:
    """The number of finished iterations in a checkpoint."""
    return int(path.name.removeprefix("step-"))


def find(folder: Path, iteration: int | None = None) -> Path:
    """A run's checkpoint at an iteration; the newest one if None.

    Raises:
        UserError: if there is none, with a list of those that exist.
    """
    known = iterations(folder)
    if not known:
        raise UserError(f"the run {str(folder)!r} has no checkpoint yet")
    if iteration is not None and iteration not in known:
        raise UserError(
            f"the run {str(folder)!r} has no checkpoint of iteration {iteration}; it has: " + ", ".join(map(str, known))
        )
    return folder / "checkpoints" / f"step-{known[-1] if iteration is None else iteration}"


async def load(run: Run, path: Path) -> None:
    """Restore a checkpoint, so that training continues bit for bit. Pending summaries are started again.

    Raises:
        UserError: if it is not a checkpoint, or is damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not a checkpoint of a run: {error}") from error
    if not isinstance(state, dict) or (missing := sorted(_KEYS - state.keys())):
        lacks = f"lacks {', '.join(missing)}" if isinstance(state, dict) else "is no JSON object"
        raise UserError(
            f"{str(path)!r} is not a checkpoint that this version of skillsd can resume: state.json {lacks}"
        )
    await run.engine.load_state(path)
    run.bank.restore(path / "skills.sqlite")
    try:
        run.iteration, run.totals, run.visits = int(state["iteration"]), dict(state["totals"]), dict(state["visits"])
        if run.best:
            run.best.restore(state["best_successes"])
        if run.summaries:
            run.summaries.restore_stats(state["summary_stats"])
            run.summaries.resume(state["pending_summaries"])  # last: it starts them
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{str(path)!r} is damaged: state.json has other content than expected ({error})") from error


async def load_weights(engine: Engine | Learner, path: Path) -> None:
    """Load the engine's part of a checkpoint.

    Raises:
        UserError: if it can't be read, with the run's other checkpoints.
    """
    try:
        await engine.load_state(path)
    except UserError as error:
        others = [f"step-{other}" for other in iterations(path.parent.parent) if other != number(path)]
        raise UserError(f"{error}. Other checkpoints of this run: {', '.join(others) or 'none'}") from error


def _all(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first. Folders with other names (``step-10-backup``) are ignored."""
    found = {path: _NAME.fullmatch(path.name) for path in (folder / "checkpoints").glob("step-*")}
    return [path for _, path in sorted((int(match.group(1)), path) for path, match in found.items() if match)]


def _sync(folder: Path) -> None:
    """Flush everything in `folder` to the disk, before the rename marks it as complete."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
