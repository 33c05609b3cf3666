"""What a run leaves behind while it runs: metrics.jsonl, evaluations.jsonl, trajectories, TensorBoard, W&B."""

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
    """Writes a run's records into its folder; `on_record` and `on_note` let a progress display listen.

    Args:
        resumed_at: finished iterations of the checkpoint that the run goes on from; records of later ones are dropped,
            as they are about to be made again. None for a new run.
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
        # W&B first: if it is not installed, nothing is left behind.
        self._wandb = _wandb(folder, options.wandb, name) if options.wandb else None
        self._tensorboard = _tensorboard(folder, resumed_at) if options.tensorboard else None

    def iteration(self, record: Mapping[str, Any]) -> None:
        self._write(METRICS, record)
        self._on_record("iteration", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._write(EVALUATIONS, record)
        self._on_record("evaluation", record)

    def trajectories(self, iteration: int, groups: Sequence[Group]) -> None:
        """One JSON object a line, one file an iteration."""
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
    """The records of a .jsonl file; a last line that a crash cut short is left out."""
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
    """Write a file that is there whole or not at all; what is no file (a device) is just written to."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def keep_until(path: Path, iteration: int) -> None:
    """Drop a file's records of iterations after `iteration`."""
    records = read(path)
    kept = [record for record in records if record["iteration"] <= iteration]
    if path.exists():
        aside = path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        aside.replace(path)


def _jsonable(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no nan: None says that there was nothing to measure."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _tensorboard(folder: Path, resumed_at: int | None) -> Any:
    from tensorboardX import SummaryWriter

    # What TensorBoard was told of later iterations is about to be told again.
    purge = None if resumed_at is None else resumed_at + 1
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge)


def _wandb(folder: Path, project: str, name: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("log.wandb needs the package wandb: pip install 'skillsd[wandb]'") from error
    # The folder remembers its W&B run, so that a resumed run goes on there as well.
    kept = folder / "wandb-id"
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
    return wandb.init(project=project, name=name, id=kept.read_text(), dir=str(folder), resume="allow")
