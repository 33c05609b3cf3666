"""Which tasks an iteration trains on: the least visited first, optionally easy ones before hard ones."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from skillsd.config import CurriculumSection
from skillsd.errors import UserError
from skillsd.seeds import derive_seed
from skillsd.types import TRAIN_SPLIT, Task

Visits = Mapping[str, int]
"""Task id -> number of iterations that picked it."""


class Curriculum:
    """Picks tasks without replacement within an iteration; every task is visited before any is visited again.

    With ``easy_first`` (as in the paper's Sokoban; the paper does not say how harder levels are added, so this is ours)
    training starts with the easiest tasks, and the share of tasks in the pool grows linearly until ``full_at`` of the
    training. A new task starts with as many visits as the least visited one, so that new tasks are not repeated to
    catch up.

    Args:
        per_iteration: number of tasks per iteration.
        iterations: length of the training.

    Raises:
        ValueError: for tasks of evaluation splits.
        UserError: if there are fewer tasks than an iteration needs.
    """

    def __init__(
        self, tasks: Sequence[Task], options: CurriculumSection, *, per_iteration: int, iterations: int, seed: int
    ) -> None:
        held_out = [task.id for task in tasks if task.split != TRAIN_SPLIT]
        if held_out:
            raise ValueError(f"tasks of evaluation splits can't be trained on: {held_out[:3]} ...")
        if len(tasks) < per_iteration:
            raise UserError(
                f"rollout.tasks_per_iteration is {per_iteration}, but the environment has {len(tasks)} training tasks"
            )
        # The sort is stable: tasks of equal difficulty keep the environment's order.
        self._tasks = sorted(tasks, key=lambda task: task.difficulty)
        self._options, self._per_iteration, self._iterations, self._seed = options, per_iteration, iterations, seed

    @property
    def tasks(self) -> Sequence[Task]:
        """All tasks, easy ones first."""
        return self._tasks

    @property
    def size(self) -> int:
        """Number of tasks."""
        return len(self._tasks)

    def pick(self, iteration: int, visits: Visits) -> tuple[list[Task], dict[str, int]]:
        """The tasks of an iteration, and the visits after it. A pure function of the arguments.

        Args:
            iteration: its number, from 0.
            visits: the visits after the previous iteration; empty at the start.
        """
        pool = self._tasks[: self._pool_size(iteration)]
        after = dict(visits)
        least = min((after[task.id] for task in pool if task.id in after), default=0)
        for task in pool:
            after.setdefault(task.id, least)
        order = random.Random(derive_seed(self._seed, "curriculum", iteration))
        # Only random() is guaranteed to give the same numbers in every Python version; shuffle is not.
        keyed = [(after[task.id], order.random(), place) for place, task in enumerate(pool)]
        chosen = [pool[place] for _, _, place in sorted(keyed)[: self._per_iteration]]
        for task in chosen:
            after[task.id] += 1
        return chosen, after

    def _pool_size(self, iteration: int) -> int:
        if not self._options.easy_first:
            return len(self._tasks)
        share = min(1.0, iteration / max(1.0, self._options.full_at * self._iterations))
        grown = self._per_iteration + share * (len(self._tasks) - self._per_iteration)
        return max(self._per_iteration, math.ceil(grown))
