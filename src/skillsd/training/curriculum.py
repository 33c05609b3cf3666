"""Which tasks an iteration trains on: the least visited first, and, if asked for, the easy ones before the hard."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from skillsd.config import CurriculumSection
from skillsd.errors import UserError
from skillsd.seeds import derive_seed
from skillsd.types import TRAIN_SPLIT, Task


class Curriculum:
    """Picks tasks without replacement within an iteration; every task is visited before any is visited again.

    With ``easy_first`` (the paper's Sokoban set-up; how it lets harder levels in is not given, so this is ours) only
    the easiest tasks are in at the start, and the share of tasks that are in grows linearly until ``full_at`` of the
    training. A task that comes in has the visits of the least visited one, so newcomers are not drilled to catch up.
    """

    def __init__(
        self, tasks: Sequence[Task], options: CurriculumSection, *, per_iteration: int, iterations: int, seed: int
    ) -> None:
        held_out = [task.id for task in tasks if task.split != TRAIN_SPLIT]
        if held_out:
            raise ValueError(f"tasks of evaluation splits may not be trained on: {held_out[:3]} ...")
        if len(tasks) < per_iteration:
            raise UserError(
                f"rollout.tasks_per_iteration is {per_iteration}, but the environment has {len(tasks)} training tasks"
            )
        # Stable: tasks of equal difficulty keep the environment's order.
        self._tasks = sorted(tasks, key=lambda task: task.difficulty)
        self._options, self._per_iteration, self._iterations, self._seed = options, per_iteration, iterations, seed
        self._visits: dict[str, int] = {}

    def pick(self, iteration: int) -> list[Task]:
        """The tasks of an iteration, visits recorded."""
        pool = self._tasks[: self._pool_size(iteration)]
        least = min(self._visits.get(task.id, 0) for task in pool if task.id in self._visits) if self._visits else 0
        for task in pool:
            self._visits.setdefault(task.id, least)
        order = random.Random(derive_seed(self._seed, "curriculum", iteration))
        # random() alone is promised to give the same numbers in every Python version; shuffle is not.
        keyed = [(self._visits[task.id], order.random(), place) for place, task in enumerate(pool)]
        chosen = [pool[place] for _, _, place in sorted(keyed)[: self._per_iteration]]
        for task in chosen:
            self._visits[task.id] += 1
        return chosen

    def _pool_size(self, iteration: int) -> int:
        if not self._options.easy_first:
            return len(self._tasks)
        share = min(1.0, iteration / max(1.0, self._options.full_at * self._iterations))
        grown = self._per_iteration + share * (len(self._tasks) - self._per_iteration)
        return max(self._per_iteration, math.ceil(grown))

    def state(self) -> dict[str, int]:
        """For the checkpoint."""
        return dict(self._visits)

    def restore(self, state: Mapping[str, int]) -> None:
        self._visits = dict(state)
