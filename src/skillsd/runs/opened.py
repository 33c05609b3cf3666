"""Reads the folder of a finished or running run: metrics, evaluations, trajectories and skills as plain Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from skillsd.config import RunConfig
from skillsd.envs.base import TaskSet
from skillsd.envs.registry import load as load_environment
from skillsd.errors import UserError
from skillsd.files.read import read_json_object
from skillsd.objective import Objective
from skillsd.report.writer import EVALUATIONS, METRICS, TRAJECTORIES, read
from skillsd.rollouts.groups import RecordedGroup, read_groups, written_iterations
from skillsd.runs.build import BANK
from skillsd.runs.lifecycle import load_config
from skillsd.skills.bank import Bank, StoredSkill
from skillsd.training import checkpoint
from skillsd.training.recorded import recorded_objective
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
        return written_iterations(self.folder / TRAJECTORIES)

    def groups(self, iteration: int | None = None) -> Iterator[RecordedGroup]:
        """The groups of an iteration as they were trained on: trajectories, advantages, the teacher's context, and the
        log-probs of teacher and student.

        Args:
            iteration: counted from 1, as in the metrics; all that were written if None.

        Raises:
            UserError: if the iteration was not written, a record is damaged, or it has an earlier version's format.
        """
        for number in self.iterations_with_trajectories if iteration is None else [iteration]:
            yield from read_groups(self.folder / TRAJECTORIES, number)

    def trajectories(self, iteration: int | None = None) -> Iterator[Trajectory]:
        """The trajectories of `groups`. Their log-probs have four decimals."""
        for group in self.groups(iteration):
            yield from group.trajectories

    @cached_property
    def task_set(self) -> TaskSet:
        """The run's environment.

        Raises:
            UserError: if it can't be loaded here.
        """
        return load_environment(self.config.environment.name, self.config.environment.options)

    def picture(self, trajectory: Trajectory, turn: int | None) -> Mapping[str, Any] | None:
        """What a turn looks like, see `TaskSet.picture`; None too if the environment can't be loaded or fails."""
        try:
            return self.task_set.picture(trajectory, turn)
        except UserError:
            return None

    def objective(self, iteration: int) -> Objective:
        """The loss's settings in an iteration, for `skillsd.training.recorded`."""
        return recorded_objective(self.config, iteration)

    @property
    def episodes(self) -> Records:
        """One record per written trajectory, without its tokens and turns. ``gap`` is the mean over the action tokens
        of the teacher's log-prob minus the student's."""
        return [
            {
                "iteration": group.iteration,
                "task": t.task.id,
                "difficulty": t.task.difficulty,
                "outcome": t.outcome.value,
                "reward": t.reward,
                "success": t.success,
                "turns": len(t.turns),
                "tokens": len(t.tokens),
                "sampled_tokens": t.action_tokens,
                "seed": t.seed,
                "advantage": episode.advantage,
                "taught": group.taught,
                "skill": group.skill_id,
                "gap": sum(episode.gaps) / len(episode.gaps) if episode.gaps else None,
            }
            for group in self.groups()
            for episode in group.episodes
            for t in [episode.trajectory]
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
