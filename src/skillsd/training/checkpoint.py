"""Checkpoints: folders that are complete or absent. Each is written under another name, fsynced, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skillsd.engines.base import Engine, Learner
from skillsd.errors import UserError
from skillsd.files.read import DamagedError, read_json_object
from skillsd.files.write import make_folder, writing
from skillsd.training import rollouts
from skillsd.training.run import Run

_NAME = re.compile(r"step-(\d+)")
_KEYS: Mapping[str, type] = {
    "iteration": int,
    "totals": dict,
    "visits": dict,
    "pending_summaries": list,
    "summary_stats": dict,
    "best_successes": dict,
    "reading": dict,
    "taught": dict,
    "ahead": bool,
}
"""Keys of state.json, with their types."""
_REMEDY = "it can't be used"


async def save(run: Run) -> Path:
    """Write ``checkpoints/step-N``: weights, optimiser, random state, task visits, bank with UCB's counts, pending
    summaries, successes to imitate, rollouts that were sampled ahead. Deletes checkpoints beyond ``checkpoint.keep``.

    Raises:
        WriteFailedError: if it can't be written, e.g. on a full disk. Earlier checkpoints are unchanged.
    """
    parent = run.folder / "checkpoints"
    make_folder(parent)
    target = parent / f"step-{run.iteration}"
    aside = parent / f".step-{run.iteration}.partial"
    for left in parent.glob(".step-*.partial"):  # of a process that was killed while writing
        shutil.rmtree(left)
    try:
        with writing(target, by_library=True):
            aside.mkdir()
            await run.learner.save_state(aside)
            run.bank.snapshot(aside / "skills.sqlite")
            _write_state(run, aside)
            _sync(aside)
            if not target.exists():
                aside.rename(target)
                _sync_folder(parent)
    finally:  # after a failure, or if it is the same step again after a resume, which is identical
        shutil.rmtree(aside, ignore_errors=True)
    for old in _all(run.folder)[: -run.config.checkpoint.keep]:
        going = parent / f".{old.name}.partial"
        old.rename(going)  # a half-deleted folder must not look like a checkpoint
        shutil.rmtree(going)
    return target


def _write_state(run: Run, aside: Path) -> None:
    state = {
        "iteration": run.iteration,
        "totals": run.totals,
        "visits": run.visits,
        "pending_summaries": run.summaries.pending() if run.summaries else [],
        "summary_stats": run.summaries.stats() if run.summaries else {},
        "best_successes": run.best.state() if run.best else {},
        "reading": run.reading,
        "taught": run.taught,
        "ahead": run.ahead is not None,
    }
    if run.ahead is not None:
        rollouts.write(run.ahead, aside)
    (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")


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


async def load_weights(engine: Engine | Learner, path: Path) -> None:
    """Load the engine's part of a checkpoint.

    Raises:
        DamagedError: if it is missing or damaged, with the run's other checkpoints.
        UserError: if it belongs to another model.
    """
    try:
        await engine.load_state(path)
    except DamagedError as error:
        others = [str(other) for other in iterations(path.parents[1]) if other != number(path)]
        remedy = f"give one of the run's other checkpoints with --at: {', '.join(others)}"
        raise DamagedError(error.path, error.fault, remedy if others else "the run has no other checkpoint") from error


async def load(run: Run, path: Path) -> None:
    """Restore a checkpoint, so that training continues bit for bit. Pending summaries are started again.

    Raises:
        DamagedError: if a file of it is missing or damaged.
        UserError: if it is of another version, model or task set.
    """
    state = _read_state(path)
    run.ahead = rollouts.read(path, state["iteration"], _REMEDY) if state["ahead"] else None
    await run.engine.load_state(path)
    run.bank.restore(path / "skills.sqlite")
    run.iteration, run.totals, run.visits = state["iteration"], state["totals"], state["visits"]
    run.reading, run.taught = state["reading"], state["taught"]
    try:
        if run.best:
            run.best.restore(state["best_successes"])
        if run.summaries:
            run.summaries.restore_stats(state["summary_stats"])
            run.summaries.resume(state["pending_summaries"])  # last: it starts them
    except ValueError as error:
        raise DamagedError(path / "state.json", f"is damaged ({error})", _REMEDY) from error


def _read_state(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    state = read_json_object(file, _REMEDY)
    if missing := sorted(_KEYS.keys() - state.keys()):
        raise UserError(
            f"{str(path)!r} is not a checkpoint that this version of skillsd can resume: state.json lacks "
            f"{', '.join(missing)}"
        )
    for key, kind in _KEYS.items():
        if not isinstance(state[key], kind):
            raise DamagedError(file, f"is damaged ({key!r} is a {type(state[key]).__name__})", _REMEDY)
    if state["iteration"] != number(path):
        raise DamagedError(file, f"is damaged (it is of iteration {state['iteration']})", _REMEDY)
    for key, numbers in (
        ("totals", float | int),
        ("visits", int),
        ("summary_stats", int),
        ("reading", float | int),
    ):
        if not all(isinstance(value, numbers) and not isinstance(value, bool) for value in state[key].values()):
            raise DamagedError(file, f"is damaged ({key!r} holds something else than numbers)", _REMEDY)
    if not {"episodes", "sampled_tokens", "seconds"} <= state["totals"].keys():
        raise DamagedError(file, "is damaged ('totals' is incomplete)", _REMEDY)
    return state


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
