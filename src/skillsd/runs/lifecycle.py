"""Start or resume a run in its folder. A crash or a full disk loses at most the work since the last checkpoint."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.engines.torch.ranks import launched
from skillsd.errors import UserError
from skillsd.files.read import DamagedError, read_json_object
from skillsd.files.write import write_whole
from skillsd.report import manifest
from skillsd.report.writer import EVALUATIONS, METRICS, RunWriter, read
from skillsd.runs.build import BANK, build
from skillsd.runs.checks import check_engine, check_ranks, comparable, in_turn_note, warm_start_note
from skillsd.runs.folder import CONFIG, EARLY, ERRORS, LOCK, clear, in_use, never_began, remove_early_files
from skillsd.runs.sync import run_blocking
from skillsd.training import checkpoint
from skillsd.training.health import health, never_revisited
from skillsd.training.loop import train
from skillsd.training.run import Run

BEFORE = "before-restart"
"""Folder for the files of a run that started again, as it had ended before its first checkpoint."""
OnRecord = Callable[[str, Mapping[str, Any]], None]
"""("iteration" or "evaluation", its record) -> None."""


def default_folder(config: RunConfig) -> Path:
    """The folder of a run if none is given."""
    return Path("runs") / f"{config.name}-{config.method}-seed{config.seed}"


def is_run(target: str | Path) -> bool:
    """Whether `target` is the folder of a training run."""
    return (Path(target) / CONFIG).is_file()


def load_config(folder: str | Path) -> RunConfig:
    """The configuration of the run in `folder`.

    Raises:
        UserError: if it is not a run's folder.
    """
    if not is_run(folder):
        raise UserError(f"{str(folder)!r} is not a run's folder: expected one with {CONFIG}")
    return configs.load(RunConfig, str(Path(folder) / CONFIG))


def run_training(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_record: OnRecord = lambda kind, record: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> bool:
    """`run_training_async`, called synchronously. In the main thread, Ctrl-C stops after the current iteration."""
    with _stop_on_interrupt(on_note) as should_stop:
        return run_blocking(
            run_training_async(
                config, folder, resume=resume, on_record=on_record, on_note=on_note, should_stop=should_stop
            )
        )


async def run_training_async(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_record: OnRecord = lambda kind, record: None,
    on_note: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train in `folder`.

    Args:
        resume: continue the folder's run from its last checkpoint.
        on_record: called with ("iteration" or "evaluation", its record).
        on_note: called with messages for the user.
        should_stop: called before each iteration.

    Returns:
        True if the last iteration is done, False if `should_stop` ended training earlier.

    Raises:
        UserError: if settings do not fit, the folder holds a run that `resume` does not allow to continue, another
            process trains in it, or a file can't be written.
    """
    check_ranks(config, launched.size())
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file, but a run needs a folder: give another one with --out")
    with in_use(folder, on_note):
        return await _train_in(folder, config, resume, on_record, on_note, should_stop)


async def _train_in(
    folder: Path,
    config: RunConfig,
    resume: bool,
    on_record: OnRecord,
    on_note: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> bool:
    saved = _prepare(config, folder, resume, on_note)
    run: Run | None = None
    writer: RunWriter | None = None
    try:
        run = build(config, folder)
        await check_engine(run)
        if saved:
            _check_inputs(run, folder)
            await _restore(run, saved, on_note)
        writer = RunWriter(
            folder,
            config.log,
            name=f"{config.name}-{config.method}-seed{config.seed}",
            resumed_at=run.iteration if saved else None,
            on_record=_note_findings(config, folder, on_record, on_note),
            on_note=on_note,
        )
        too_short = never_revisited(config, run.curriculum.size)
        of_recipe = (warm_start_note(config), in_turn_note(config), too_short)
        for note in (*run.renderer.notes(), *filter(None, of_recipe)):
            writer.note(str(note))
        if not saved:
            manifest.write(folder, config, run.task_set)
        _write_config(config, folder)  # from here on the folder is a run's
        return await train(run, writer, should_stop)
    finally:
        if writer is not None:
            writer.close()
        if run is not None:
            run.close()
        if not (folder / CONFIG).exists():  # the run did not start: leave the folder as it was
            remove_early_files(folder)


def _prepare(config: RunConfig, folder: Path, resume: bool, note: Callable[[str], None]) -> list[Path]:
    """Check the folder; returns the checkpoints to resume from, the newest first. If there are none, the run starts."""
    if not (folder / CONFIG).exists():
        left = [path.name for path in folder.iterdir() if path.name not in (LOCK, ERRORS)]
        if any(not (resume and name.startswith(EARLY)) for name in left):
            raise UserError(f"{str(folder)!r} holds files that are not a run's: give another folder with --out")
        clear(folder)  # of a run that was killed while it was being set up
        return []
    if never_began(folder):
        note(f"the run in {folder} had not finished an iteration: it starts anew")
        clear(folder)
        return []
    if not resume:
        raise UserError(
            f"{str(folder)!r} holds a run already: resume it with --resume, or give another folder with --out"
        )
    check_settings(config, folder)
    saved = [checkpoint.find(folder, iteration) for iteration in reversed(checkpoint.iterations(folder))]
    if not saved:
        _start_again(folder, note)
    return saved


def _start_again(folder: Path, note: Callable[[str], None]) -> None:
    """Prepare a run without a checkpoint to start at its beginning; what it has written so far is kept aside.

    Raises:
        UserError: if it must have had checkpoints: they are gone, and the user may have a copy.
    """
    every = load_config(folder).checkpoint.every
    done = max((record["iteration"] for record in read(folder / METRICS)), default=0)
    if every and done > every:
        raise UserError(
            f"{str(folder)!r} has metrics of {done} iterations, but its checkpoints are gone: to resume, put "
            f"{folder / 'checkpoints'} back, or start again in another folder with --out"
        )
    aside = _unused(folder / BEFORE)
    if done:
        aside.mkdir()
        note(
            f"{folder} has no checkpoint yet, so the run starts again; its first {done} iterations are kept in {aside}"
        )
    for path in [folder / METRICS, folder / EVALUATIONS, *folder.glob(f"{BANK}*")]:  # the bank with its journal
        if done and path.exists():
            path.replace(aside / path.name)
        path.unlink(missing_ok=True)


async def _restore(run: Run, saved: Sequence[Path], note: Callable[[str], None]) -> None:
    """Load the newest checkpoint that can be read. Damaged ones are renamed, so that they don't count any more.

    Raises:
        UserError: if none can be read.
    """
    damaged: list[tuple[Path, DamagedError]] = []
    for path in saved:
        try:
            await checkpoint.load(run, path)
        except DamagedError as error:
            damaged.append((path, error))
            continue
        for other, reason in damaged:
            kept = other.rename(_unused(other.with_name(f"{other.name}.damaged")))
            note(f"{reason}. It is kept as {kept}; {path.name} is there and is used instead")
        done, last = run.iteration, run.config.training.iterations
        note(f"resuming from {path}: " + (f"iteration {done + 1} of {last} is next" if done < last else "all is done"))
        return
    others = ", ".join(other.name for other, _ in damaged[1:])
    raise UserError(f"{damaged[0][1]}" + (f". Nor can {others} be read" if others else ""))


def _unused(path: Path) -> Path:
    """`path`, or with the first number behind its name that is not in use."""
    return next(p for n in count(1) if not (p := path.with_name(path.name + f"-{n}" * (n > 1))).exists())


def _note_findings(config: RunConfig, folder: Path, on_record: OnRecord, note: Callable[[str], None]) -> OnRecord:
    """Wrap `on_record`: note each state in which nothing is learnt, once. Those at the end are in `closing`."""
    records: list[Mapping[str, Any]] | None = None
    known: set[str] = set()

    def watch(kind: str, record: Mapping[str, Any]) -> None:
        nonlocal records
        on_record(kind, record)
        if kind != "iteration":
            return
        if records is None:
            records = list(read(folder / METRICS))  # on resume the earlier ones, too
        else:
            records.append(record)
        if record["iteration"] < config.training.iterations:
            for finding in health(records, config):
                if finding.name not in known:
                    note(str(finding))
                known.add(finding.name)

    return watch


def check_settings(config: RunConfig, folder: Path) -> None:
    """Check that the run in `folder` can be resumed with `config`.

    Raises:
        UserError: with the keys that differ, if it can't.
    """
    differences = _differences(comparable(load_config(folder)), comparable(config))
    if differences:
        raise UserError(
            f"{str(folder)!r} holds a run with other settings: {'; '.join(differences)}. Restore them, or give another "
            "folder with --out"
        )


def _write_config(config: RunConfig, folder: Path) -> None:
    """Written for a resumed run as well, since its length, for example, may have changed."""
    write_whole(folder / CONFIG, configs.dump(config))


def _check_inputs(run: Run, folder: Path) -> None:
    """Check that tasks, texts and models are those the run started with; otherwise its metrics would mix two runs."""
    before = read_manifest(folder)
    if "panels" not in before:
        raise UserError(
            f"{str(folder)!r} has no readable manifest.json, so the tasks it was trained on are unknown: start again "
            "in another folder, with --out"
        )
    changed = [split for split in run.task_set.splits if before["panels"].get(split) != run.task_set.fingerprint(split)]
    if changed:
        raise UserError(
            f"the tasks of {', '.join(changed)} have changed since {str(folder)!r} was started: start again in another "
            "folder, with --out"
        )
    check_texts(run.config, folder)
    if other := manifest.changed_models(before, run.config):
        raise UserError(
            f"the files of the {' and the '.join(other)} have changed since {str(folder)!r} was started: restore them, "
            "or start again in another folder, with --out"
        )


def check_texts(config: RunConfig, folder: Path) -> None:
    """Check that the skill template and the summariser's prompt are those that the run in `folder` started with.

    Raises:
        UserError: with the keys that name them, if they are not.
    """
    before = read_manifest(folder).get("texts", {})
    if changed := [key for key, text in manifest.texts(config).items() if before.get(key, text) != text]:
        raise UserError(
            f"the text behind {' and '.join(changed)} has changed since {str(folder)!r} was started: restore it, or "
            "give another folder with --out"
        )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """A run's manifest; empty if it is not readable."""
    try:
        found = read_json_object(Path(folder) / "manifest.json", "")
    except DamagedError:
        return {}
    parts = [found.get(key, {}) for key in ("panels", "texts", "model", "adapter", "teacher")]
    return found if all(isinstance(part, dict) for part in parts) else {}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
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
    """On the first Ctrl-C (or SIGTERM, as when a machine is pre-empted) training stops after the current iteration; on
    a second Ctrl-C it stops at once."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            # asyncio would print a traceback for each cancelled episode.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            raise KeyboardInterrupt
        asked = True
        with suppress(RuntimeError):  # reentrant call: Ctrl-C came during a write to the same terminal
            note(
                "stopping after this iteration (Ctrl-C again: stop at once, losing the work since the last checkpoint)"
            )

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, handle) for number in signals}
    except ValueError:  # not in the main thread: signals are up to the caller
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
