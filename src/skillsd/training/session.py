"""Start or take up a run in its folder, so that Ctrl-C, a crash or a full disk costs at most what is after the last
checkpoint."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.errors import UserError
from skillsd.report import manifest
from skillsd.report.writer import RunWriter
from skillsd.training import checkpoint
from skillsd.training.loop import train
from skillsd.training.run import BANK, Run, build, comparable

CONFIG = "config.yaml"
_BEFORE_CONFIG = (BANK, "manifest.json", "tensorboard", f".{CONFIG}.partial")
"""What a run makes before its configuration says that the folder is its own."""


def default_folder(config: RunConfig) -> Path:
    """Where a run lives unless told otherwise."""
    return Path("runs") / f"{config.name}-{config.method}-seed{config.seed}"


def run_training(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_record: Callable[[str, Mapping[str, Any]], None] = lambda kind, record: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> bool:
    """Train in `folder`; True if the last iteration is done, False if Ctrl-C asked for an earlier end.

    Raises:
        UserError: if the folder holds a run already and `resume` is not given, or holds a different one.
    """
    new = not folder.exists()
    start = _prepare(config, folder, resume)
    run: Run | None = None
    writer: RunWriter | None = None
    try:
        run = build(config, folder)
        if start is not None:
            _check_panels(run, folder)
        writer = RunWriter(
            folder,
            config.log,
            name=f"{config.name}-{config.method}-seed{config.seed}",
            resumed_at=checkpoint.number(start) if start else None,
            on_record=on_record,
            on_note=on_note,
        )
        for note in run.renderer.notes():
            writer.note(note)
        if start is None:
            manifest.write(folder, config, run.task_set)
        _write_config(config, folder)  # from here on the folder is a run's
        with _stop_on_interrupt(on_note) as stopping:
            return asyncio.run(_train(run, writer, start, stopping))
    finally:
        if writer is not None:
            writer.close()
        if run is not None:
            run.close()
        if not (folder / CONFIG).exists():  # it never began: another try finds the folder as this one found it
            (folder / BANK).unlink(missing_ok=True)
            if new:
                with suppress(OSError):  # it holds more than that: left for whoever wants to know why
                    folder.rmdir()


async def _train(run: Run, writer: RunWriter, start: Path | None, stopping: Callable[[], bool]) -> bool:
    if start is not None:
        checkpoint.load(run, start)
    return await train(run, writer, stopping)


def _prepare(config: RunConfig, folder: Path, resume: bool) -> Path | None:
    """Check the folder; the checkpoint to go on from, if any."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file; a run needs a folder: give another one with --out")
    if not (folder / CONFIG).exists():
        left = list(folder.iterdir()) if folder.exists() else []
        if any(not (resume and path.name.startswith(_BEFORE_CONFIG)) for path in left):
            raise UserError(f"{str(folder)!r} holds other things than a run; give another folder with --out")
        for path in left:  # of a run that was killed while it was put together
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        return None
    if not resume:
        raise UserError(f"{str(folder)!r} holds a run already: go on with --resume, or give another folder with --out")
    check_settings(config, folder)
    start = checkpoint.latest(folder)
    if start is None:  # it ended before its first checkpoint: begin again
        (folder / BANK).unlink(missing_ok=True)
    return start


def check_settings(config: RunConfig, folder: Path) -> None:
    """Whether the run in `folder` may be gone on with as `config`.

    Raises:
        UserError: with the keys that differ, if it is another run.
    """
    before = configs.load(RunConfig, str(folder / CONFIG))
    differences = _differences(comparable(before).model_dump(), comparable(config).model_dump())
    if differences:
        raise UserError(f"{str(folder)!r} holds a run with other settings: " + "; ".join(differences))


def _write_config(config: RunConfig, folder: Path) -> None:
    """Of a resumed run too: how long it trains, for one, may be another than before."""
    aside = folder / f".{CONFIG}.partial"
    aside.write_text(configs.dump(config), encoding="utf-8")
    aside.replace(folder / CONFIG)


def _check_panels(run: Run, folder: Path) -> None:
    """A run goes on with the tasks it began with, or its figures would be of two panels."""
    try:
        before = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["panels"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{str(folder)!r} has no readable manifest.json, so what it trained on is unknown") from error
    changed = [split for split in run.task_set.splits if before.get(split) != run.task_set.fingerprint(split)]
    if changed:
        raise UserError(
            f"the tasks of {', '.join(changed)} are others than when {str(folder)!r} was begun: start anew in another "
            "folder, with --out"
        )


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in before.keys() | now.keys():
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a!r}, now {b!r}")
    return sorted(found)


@contextmanager
def _stop_on_interrupt(note: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM, as when a machine is pre-empted) asks for a stop after this iteration; a second
    Ctrl-C stops at once."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            # The episodes that this tears down are no news, and asyncio would print a traceback for each.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            raise KeyboardInterrupt
        asked = True
        with suppress(RuntimeError):  # Ctrl-C came in the midst of a write to the same terminal
            note("stopping after this iteration (Ctrl-C again: at once, back to the last checkpoint)")

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, handle) for number in signals}
    except ValueError:  # not in the main thread: whoever runs us handles signals
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
