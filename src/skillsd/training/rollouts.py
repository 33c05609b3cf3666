"""What the rollout phase hands to the learn phase, and its file in a checkpoint."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from skillsd.files.read import DamagedError, read_compressed_lines
from skillsd.rollouts.collect import Collected
from skillsd.rollouts.records import task_to_json, trajectory_from_json, trajectory_to_json
from skillsd.skills.bank import StoredSkill
from skillsd.types import Group, Task

FILE = "rollouts.jsonl.gz"
"""In a checkpoint: the rollouts that the next iteration trains on."""


@dataclass(frozen=True)
class TeacherContext:
    """The privileged context that is available for one task.

    Attributes:
        skill: the picked skill, if the method uses skills and the bank has one.
        text: the context as it is added to a prompt. ``""`` adds nothing. None: no context available; the group trains
            without a teacher.
        too_long: the context exceeds ``skills.teacher_extra_tokens``, so it is not used (text is None).
        reading: the group acts with the context in the student's own prompt and trains without a teacher
            (`skillsd.training.reading`).
    """

    skill: StoredSkill | None = None
    text: str | None = None
    too_long: bool = False
    reading: bool = False


@dataclass(frozen=True)
class Rollouts:
    """The result of a rollout phase, for the learn phase.

    Attributes:
        iteration: its number, from 0.
        contexts: task id -> context, where it was selected before the rollouts because the sampling policy's prompt
            holds it.
        seconds: wall-clock time of the rollouts.
        ahead: whether they were sampled while the iteration before was trained.
        figures: metrics of the teacher's synchronisation.
    """

    iteration: int
    collected: Collected
    contexts: Mapping[str, TeacherContext]
    seconds: float
    ahead: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        return self.collected.groups

    @property
    def plain(self) -> list[Group]:
        """The groups without those that only keep up the student's reading: these tell nothing about its progress, and
        no skill is written about them."""
        return [group for group in self.groups if not self._reads(group)]

    @property
    def readers(self) -> list[Group]:
        """The groups that keep up the student's reading."""
        return [group for group in self.groups if self._reads(group)]

    def _reads(self, group: Group) -> bool:
        context = self.contexts.get(group.task.id)
        return context is not None and context.reading


def write(rollouts: Rollouts, folder: Path) -> None:
    """Write them into the folder of a checkpoint, exactly: a line about all, then a line for each group."""
    found = rollouts.collected
    about = {
        "iteration": rollouts.iteration,
        "seconds": rollouts.seconds,
        "infra_failures": found.infra_failures,
        "reason": found.reason,
        "dropped": [task_to_json(task) for task in found.dropped],
    }
    lines = [about, *([trajectory_to_json(t) for t in group.trajectories] for group in found.groups)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / FILE).write_bytes(gzip.compress(text.encode(), 1, mtime=0))


def read(folder: Path, iteration: int, remedy: str) -> Rollouts:
    """The rollouts of an iteration that `write` wrote.

    Raises:
        DamagedError: if the file is missing or damaged, or of another iteration; its last words are `remedy`.
    """
    path = folder / FILE
    try:
        about, *groups = [line for _, line in read_compressed_lines(path, remedy)]
        members = [tuple(trajectory_from_json(record) for record in group) for group in groups]
        collected = Collected(
            [Group(trajectories[0].task, trajectories) for trajectories in members],
            {str(outcome): int(count) for outcome, count in about["infra_failures"].items()},
            str(about["reason"]),
            [Task(**task) for task in about["dropped"]],
        )
        if about["iteration"] != iteration:
            raise ValueError(f"it is of iteration {about['iteration']}, expected {iteration}")
        return Rollouts(iteration, collected, {}, float(about["seconds"]), ahead=True)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedError(path, f"is damaged ({error!r})", remedy) from error
