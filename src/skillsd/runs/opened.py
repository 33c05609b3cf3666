"""Reads the folder of a finished or running run: metrics, evaluations, trajectories and skills as plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from skillsd.config import RunConfig
from skillsd.errors import UserError
from skillsd.files.read import DamagedError, read_json_object, read_lines
from skillsd.report.writer import EVALUATIONS, METRICS, read
from skillsd.rollouts.records import trajectory_from_json
from skillsd.runs.build import BANK
from skillsd.runs.lifecycle import load_config
from skillsd.skills.bank import Bank, StoredSkill
from skillsd.training import checkpoint
from skillsd.types import Trajectory

Records = list[dict[str, Any]]
"""Flat dicts of numbers and text: ``pandas.DataFrame(records)`` makes a table of them."""


class OpenRun:
    """A run's folder. Files are read on access; nothing is written.

    Attributes:
        folder: the run's folder.
        config: its resolved configuration.
    """

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            UserError: if it is not a run's folder.
        """
        self.folder = Path(folder)
        self.config: RunConfig = load_config(folder)

    def __repr__(self) -> str:
        return f"<run {str(self.folder)!r}: {self.config.method}, {len(self.metrics)} iterations>"

    @property
    def metrics(self) -> Records:
        """One record per iteration (docs/metrics.md)."""
        return read(self.folder / METRICS)

    @property
    def evaluations(self) -> Records:
        """One record per point of the learning curve. An interval is two columns, ``..._low`` and ``..._high``."""
        return [_flat(record) for record in read(self.folder / EVALUATIONS)]

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Versions, commit, machine, and fingerprints of panels and base weights.

        Raises:
            UserError: if the file is missing or unreadable.
        """
        return read_json_object(self.folder / "manifest.json", "restore it from a copy")

    @property
    def iterations_with_trajectories(self) -> list[int]:
        """The iterations whose trajectories were written (``log.trajectories_every``), ascending."""
        return sorted(int(path.stem.removeprefix("iteration-")) for path in self._trajectory_files())

    def trajectories(self, iteration: int | None = None) -> Iterator[Trajectory]:
        """The trajectories of an iteration, counted from 1 as in the metrics; of all iterations if None.

        Raises:
            UserError: if the iteration's trajectories were not written, or a record is damaged.
        """
        wanted = self.iterations_with_trajectories if iteration is None else [iteration]
        for number in wanted:
            path = self.folder / "trajectories" / f"iteration-{number:05d}.jsonl"
            if not path.is_file():
                known = ", ".join(map(str, self.iterations_with_trajectories)) or "none"
                raise UserError(f"{str(self.folder)!r} has no trajectories of iteration {number}; it has: {known}")
            remedy = "remove the damaged line, or restore the file"
            for place, record in read_lines(path, remedy):
                try:
                    yield trajectory_from_json(record)
                except ValueError as error:
                    raise DamagedError(path, f"is damaged (line {place}: {error})", remedy) from error

    @property
    def episodes(self) -> Records:
        """One record per written trajectory, without its tokens and turns."""
        return [
            {
                "iteration": number,
                "task": t.task.id,
                "difficulty": t.task.difficulty,
                "outcome": t.outcome.value,
                "reward": t.reward,
                "success": t.success,
                "turns": len(t.turns),
                "tokens": len(t.tokens),
                "sampled_tokens": t.action_tokens,
                "seed": t.seed,
            }
            for number in self.iterations_with_trajectories
            for t in self.trajectories(number)
        ]

    @property
    def stored_skills(self) -> list[StoredSkill]:
        """The skills in the bank, oldest first; empty for a method without skills.

        Raises:
            UserError: if the bank is damaged.
        """
        path = self.folder / BANK
        if not path.is_file():
            return []
        with Bank(path) as bank:
            return bank.skills()

    @property
    def skills(self) -> Records:
        """One record per skill."""
        records = []
        for stored in self.stored_skills:
            record = asdict(stored)
            text = record.pop("skill")
            records.append(
                {**record, **text, "source_outcome": stored.source_outcome.value, "mean_reward": stored.mean_reward}
            )
        return records

    @property
    def checkpoints(self) -> list[int]:
        """The iterations with a checkpoint, ascending."""
        return checkpoint.iterations(self.folder)

    def model_folder(self, iteration: int | None = None) -> Path:
        """The folder with a checkpoint's weights (under LoRA the adapter) and tokenizer, as ``transformers`` loads it.

        Args:
            iteration: of the checkpoint; the last one if None.

        Raises:
            UserError: if there is no such checkpoint.
        """
        return checkpoint.find(self.folder, iteration) / "model"

    def _trajectory_files(self) -> list[Path]:
        return list((self.folder / "trajectories").glob("iteration-*.jsonl"))


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """The record with each pair [low, high] as two entries."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, list):
            flat[f"{name}_low"], flat[f"{name}_high"] = value
        else:
            flat[name] = value
    return flat


def open_run(path: str | Path) -> OpenRun:
    """Open a run's folder to read its metrics, evaluations, trajectories and skills.

    Raises:
        UserError: if it is not a run's folder.
    """
    return OpenRun(path)
