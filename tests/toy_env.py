"""A tiny environment for the tests of rollouts and training, with faults that can be injected.

A task has one move that solves it and one that fails it. Any other move is answered with a cell drawn from the
environment's seed. Avoiding `Down` in the first turn gives half the reward. Any text counts as one of the four moves,
so that even an untrained model gets a mix of rewards.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.types import Message, Skill, Task, Trajectory

MOVES = ("Up", "Down", "Left", "Right")
DEFAULT_SPLITS = {"train": 7, "tune": 4, "test": 3}


def move_of(text: str) -> str:
    """The move that `text` counts as; a move's name counts as that move."""
    return ("Down", "Up", "Right", "Left")[sum(map(ord, text)) % 4]


class ToyEnvironment(Environment):
    """One episode. The owner's `faults` is called first in every call, and may raise or return an awaitable."""

    def __init__(self, owner: Toy, number: int) -> None:
        self.owner, self.number = owner, number
        self.closed = 0
        self.resets: list[tuple[str, int]] = []
        self.actions: list[str] = []

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        self.resets.append((task.id, seed))
        self.task, self.turn, self.reward = task, 0, 0.0
        self.random = random.Random(seed)
        await self.owner.fault("reset", self)
        return (Message("user", f"Sokoban: #{self._cell()} @{self._cell()}"),)

    async def step(self, action: str) -> Step:
        self.actions.append(action)
        await self.owner.fault("step", self)
        self.turn += 1
        move = move_of(action)
        solved = move == self.task.payload["target"]
        if self.turn == 1 and move != "Down":
            self.reward = 0.5
        if solved:
            self.reward = 1.0
        lost = not solved and move == self.task.payload.get("loses")
        words = "Solved" if solved else "Over" if lost else f"@{self._cell()}"
        return Step(words, solved or lost, self.reward, solved, {"turn": self.turn})

    async def close(self) -> None:
        self.closed += 1
        await self.owner.fault("close", self)

    def _cell(self) -> str:
        return f"r{self.random.randrange(6)}c{self.random.randrange(6)}"


class Toy(TaskSet):
    """Tasks are numbered within a split.

    Args:
        turns: maximum number of turns.
        sizes: split -> number of tasks.
        overlap: put the first training task into `tune` as well.
        delay: seconds that a step takes.
    """

    name: ClassVar[str] = "toy"

    def __init__(
        self, *, turns: int = 3, sizes: dict[str, int] | None = None, overlap: bool = False, delay: float = 0.0
    ) -> None:
        self._turns, self._sizes, self._overlap, self._delay = turns, sizes or DEFAULT_SPLITS, overlap, delay
        self.made: list[ToyEnvironment] = []
        self.summarised: list[Trajectory] = []
        self.faults: Callable[[str, ToyEnvironment], Any] | None = None
        self.write: Callable[[Trajectory], Skill | None] = _skill

    async def fault(self, call: str, environment: ToyEnvironment) -> None:
        if self._delay and call == "step":
            time.sleep(self._delay)  # blocking, so that decode batches, and so every bit, stay the same
        if self.faults is not None:
            outcome = self.faults(call, environment)
            if outcome is not None:
                await outcome

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._sizes)

    @property
    def max_turns(self) -> int:
        return self._turns

    def tasks(self, split: str) -> list[Task]:
        if split not in self._sizes:
            from skillsd.errors import unknown_name

            raise unknown_name("split", split, self._sizes)
        tasks = [
            Task(f"{split}-{i}", "toy", split, {"target": MOVES[i % 4], "loses": MOVES[(i + 1) % 4]}, float(-i % 5))
            for i in range(self._sizes[split])
        ]
        if self._overlap and split == "tune":
            tasks.append(Task("train-0", "toy", "tune", {"target": "Up"}))
        return tasks

    def make(self) -> ToyEnvironment:
        self.made.append(ToyEnvironment(self, len(self.made)))
        return self.made[-1]

    def summariser(self) -> Callable[[Trajectory], Skill | None]:
        def summarise(trajectory: Trajectory) -> Skill | None:
            self.summarised.append(trajectory)
            return self.write(trajectory)

        return summarise

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Any]:
        raise NotImplementedError

    @property
    def times_closed(self) -> Counter[int]:
        """Environment's number -> how often it was closed."""
        return Counter({environment.number: environment.closed for environment in self.made})


def _skill(trajectory: Trajectory) -> Skill | None:
    actions = " ".join(turn.action for turn in trajectory.turns)
    return Skill("", "", actions) if trajectory.success else Skill("", f"never {actions}", "")
