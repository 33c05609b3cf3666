"""What a run writes: metrics.jsonl, evaluations.jsonl, trajectories, TensorBoard and W&B."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skillsd.config import LogSection
from skillsd.errors import UserError
from skillsd.rollouts.records import trajectory_to_json
from skillsd.types import Group

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


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
        self._folder, self._options = folder, options
        self._on_record, self._on_note = on_record, on_note
        for file in (METRICS, EVALUATIONS):
            keep_until(folder / file, -1 if resumed_at is None else resumed_at)
        # W&B first: if it is not installed, nothing else has been created.
        self._wandb = _wandb(folder, options.wandb, name) if options.wandb else None
        self._tensorboard = _tensorboard(folder, resumed_at) if options.tensorboard else None

    def iteration(self, record: Mapping[str, Any]) -> None:
        self._write(METRICS, record)
        self._on_record("iteration", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._write(EVALUATIONS, record)
        self._on_record("evaluation", record)

    def trajectories(self, iteration: int, groups: Sequence[Group]) -> None:
        """Write an iteration's trajectories: a file per iteration, a JSON object per line."""
        every = self._options.trajectories_every
        if not every or (iteration - 1) % every:
            return
        folder = self._folder / "trajectories"
        folder.mkdir(exist_ok=True)
        with open(folder / f"iteration-{iteration:05d}.jsonl", "w", encoding="utf-8") as file:
            for group in groups:
                for trajectory in group.trajectories:
                    file.write(json.dumps(trajectory_to_json(trajectory)) + "\n")

    def note(self, text: str) -> None:
        self._on_note(text)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, file: str, record: Mapping[str, Any]) -> None:
        with open(self._folder / file, "a", encoding="utf-8") as out:
            out.write(json.dumps(_jsonable(record)) + "\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)}
        step = int(record["iteration"])
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, without a last line that was cut short by a crash."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically. Non-regular files (e.g. /dev/stdout) are written directly."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def keep_until(path: Path, iteration: int) -> None:
    """Drop the records of later iterations from a file."""
    records = read(path)
    kept = [record for record in records if record["iteration"] <= iteration]
    if path.exists():
        aside = path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        aside.replace(path)


def _jsonable(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace nan and infinities by None, as JSON has none."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _tensorboard(folder: Path, resumed_at: int | None) -> Any:
    from tensorboardX import SummaryWriter

    # Later iterations are repeated: hide their old values.
    purge = None if resumed_at is None else resumed_at + 1
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge)


def _wandb(folder: Path, project: str, name: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("log.wandb needs a package: pip install wandb") from error
    # Keep the id of the W&B run in the folder, so that a resumed run continues it.
    kept = folder / "wandb-id"
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
    return wandb.init(project=project, name=name, id=kept.read_text(), dir=str(folder), resume="allow")
