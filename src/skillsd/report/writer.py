"""What a run writes: metrics.jsonl, evaluations.jsonl, trajectories, TensorBoard, W&B and Trackio."""

from __future__ import annotations

import io
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from skillsd.config import LogSection
from skillsd.errors import UserError
from skillsd.files.read import read_records
from skillsd.files.write import append, make_folder, write_whole, writing
from skillsd.rollouts.groups import RecordedGroup, write_groups

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
TRAJECTORIES = "trajectories"
TENSORBOARD = "tensorboard"


class RunWriter:
    """Writes a run's records into its folder.

    Args:
        resumed_at: iteration of the checkpoint that the run resumes from. Later records are dropped, as those
            iterations are repeated. None for a new run.
        on_record, on_note: called for each record and note, e.g. by a progress display.
    """

    def __init__(
        self,
        folder: Path,
        options: LogSection,
        *,
        name: str,
        resumed_at: int | None = None,
        on_record: Callable[[str, Mapping[str, Any]], None] = lambda kind, record: None,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._folder = folder
        self._on_record, self._on_note = on_record, on_note
        for file in (METRICS, EVALUATIONS):
            keep_until(folder / file, -1 if resumed_at is None else resumed_at)
        # W&B and Trackio first: if one is not installed, nothing else has been created.
        self._wandb = _wandb(folder, options.wandb, name) if options.wandb else None
        self._trackio = _trackio(options.trackio, name, resumed_at) if options.trackio else None
        self._tensorboard = _tensorboard(folder, resumed_at) if options.tensorboard else None

    def iteration(self, record: Mapping[str, Any]) -> None:
        self._write(METRICS, record)
        self._on_record("iteration", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._write(EVALUATIONS, record)
        self._on_record("evaluation", record)

    def trajectories(self, iteration: int, groups: Sequence[RecordedGroup]) -> None:
        """Write an iteration's groups, with their trajectories."""
        write_groups(self._folder / TRAJECTORIES, iteration, groups)

    def note(self, text: str) -> None:
        self._on_note(text)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()
        if self._trackio is not None:
            with silent():
                self._trackio.finish()

    def _write(self, file: str, record: Mapping[str, Any]) -> None:
        append(self._folder / file, json.dumps(_jsonable(record)) + "\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)}
        step = int(record["iteration"])
        if self._tensorboard is not None:
            self._tensorboard.add(numbers, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if self._trackio is not None:
            self._trackio.log(numbers, step=step)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of `METRICS` or `EVALUATIONS`, without a last line that was cut short by a crash.

    Raises:
        DamagedError: if another line is damaged.
    """
    return read_records(path, ("iteration",))


def keep_until(path: Path, iteration: int) -> None:
    """Drop the records of later iterations from a file.

    Raises:
        DamagedError: if a line is damaged. The file is unchanged then.
    """
    kept = [record for record in read(path) if record["iteration"] <= iteration]
    if path.exists():
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


def _jsonable(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace nan and infinities by None, as JSON has none."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


class EventFile:
    """TensorBoard's event file. Written at once and not by a thread, so that a full disk is an error here.

    Args:
        purge: hide the values of earlier files from this step on, as those iterations are repeated.
    """

    def __init__(self, folder: Path, purge: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._folder, self._event = folder, event_pb2.Event
        make_folder(folder)
        with writing(folder):
            self._file = EventsWriter(str(folder / "events"))
            if purge is not None:
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._file.write_event(self._event(wall_time=time.time(), step=purge, file_version="brain.Event:2"))
                self._file.write_event(self._event(wall_time=time.time(), step=purge, session_log=start))
            self._file.flush()

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in numbers.items()]
        with writing(self._folder):
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._file.flush()


def _tensorboard(folder: Path, resumed_at: int | None) -> EventFile:
    return EventFile(folder / TENSORBOARD, None if resumed_at is None else resumed_at + 1)


def _wandb(folder: Path, project: str, name: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("log.wandb needs a package: pip install wandb") from error
    # Keep the id of the W&B run in the folder, so that a resumed run continues it.
    kept = folder / "wandb-id"
    if not kept.exists():
        write_whole(kept, uuid.uuid4().hex[:16])
    return wandb.init(project=project, name=name, id=kept.read_text(), dir=str(folder), resume="allow")


def _trackio(project: str, name: str, resumed_at: int | None) -> Any:
    try:
        import trackio
    except ImportError as error:
        raise UserError("log.trackio needs a package: pip install trackio") from error
    with silent():
        trackio.init(project=project, name=name, resume="never" if resumed_at is None else "allow", embed=False)
    return trackio


@contextmanager
def silent() -> Iterator[None]:
    """Without what a library prints on standard output."""
    with redirect_stdout(io.StringIO()):
        yield
