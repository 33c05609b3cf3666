"""Self-imitation (Oh et al., arXiv 1806.05635): the student's own best success on each task, to be imitated.

A control for claims about skills: it shows the gain from replaying successes, without skills or a teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from skillsd.rollouts.records import trajectory_from_json, trajectory_to_json
from skillsd.skills.bank import HeldOutTaskError
from skillsd.types import TRAIN_SPLIT, Group, Trajectory


class BestSuccesses:
    """The best success so far on each training task: the one with the fewest turns; among equals, the newest."""

    def __init__(self) -> None:
        self._best: dict[str, Trajectory] = {}

    def update(self, groups: Iterable[Group]) -> None:
        """Take in new trajectories.

        Raises:
            HeldOutTaskError: for a task that is not a training task.
        """
        for group in groups:
            if group.task.split != TRAIN_SPLIT:
                raise HeldOutTaskError(
                    f"task {group.task.id!r} is in the split {group.task.split!r}: only training tasks are imitated"
                )
            for trajectory in group.trajectories:
                best = self._best.get(group.task.id)
                if trajectory.success and (best is None or len(trajectory.turns) <= len(best.turns)):
                    self._best[group.task.id] = trajectory

    def of(self, task_id: str) -> Trajectory | None:
        """The task's best success; None if it has none."""
        return self._best.get(task_id)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {task: trajectory_to_json(trajectory) for task, trajectory in self._best.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._best = {task: trajectory_from_json(record) for task, record in state.items()}
