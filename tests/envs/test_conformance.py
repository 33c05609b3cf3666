"""Every conformance check fails for some broken environment, and the shipped environments pass."""

from __future__ import annotations

import itertools
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skillsd.envs import load
from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.envs.conformance import assert_conforms, check
from skillsd.envs.sokoban.presets import PRESETS, STYLES
from skillsd.errors import unknown_name
from skillsd.types import Message, Task

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_env.py"
TICK = itertools.count()


class Counting(Environment):
    """Count to three: a minimal environment that conforms."""

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        self.count = 0
        return (Message("user", "Say up three times."),)

    async def step(self, action: str) -> Step:
        self.count += action == "up"
        won = self.count == 3
        return Step(f"{self.count} of 3", won, self.count / 3, won, {"count": self.count})


class Good(TaskSet):
    name = "good"
    splits: Any = ("train", "test")
    max_turns: Any = 5
    shortcuts = {"u": "up"}  # noqa: RUF012
    environment: type[Environment] = Counting

    def tasks(self, split: str) -> list[Task]:
        if split not in self.splits:
            raise unknown_name("split", split, self.splits)
        return [Task(f"{split}-{i}", self.name, split) for i in range(3)]

    def make(self) -> Environment:
        return self.environment()


def stepping(change: Callable[[Any, Step], Any]) -> type[Good]:
    """A task set whose environment returns modified steps."""

    class Changed(Counting):
        async def step(self, action: str) -> Step:
            return change(action, await super().step(action))

    return type("Broken", (Good,), {"environment": Changed})


def tasking(change: Callable[[str, list[Task]], list[Task]]) -> type[Good]:
    """A task set with modified tasks."""
    return type("Broken", (Good,), {"tasks": lambda self, split: change(split, Good.tasks(self, split))})


def resetting(reset: Any) -> type[Good]:
    return type("Broken", (Good,), {"environment": type("E", (Counting,), {"reset": reset})})


def explode(action: str, step: Step) -> Step:
    if not action:
        raise ValueError("empty")
    return step


async def forgetful_reset(self: Any, task: Task, seed: int) -> tuple[Message, ...]:
    self.count = getattr(self, "count", 0)  # keeps state from an earlier episode
    return (Message("user", "Say up three times."),)


async def broken_reset(self: Any, task: Task, seed: int) -> tuple[Message, ...]:
    if hasattr(self, "count"):
        raise RuntimeError("only once")
    return await Counting.reset(self, task, seed)


async def text_reset(self: Any, task: Task, seed: int) -> Any:
    self.count = 0
    return "Say up three times."


async def close_once(self: Any) -> None:
    del self.count


BROKEN: list[tuple[str, type[Good]]] = [
    ("max_turns", type("Broken", (Good,), {"max_turns": 0})),
    ("splits", type("Broken", (Good,), {"splits": ("dev",)})),
    ("unknown_split", tasking(lambda split, tasks: tasks)),
    ("tasks", tasking(lambda split, tasks: [])),
    ("unique_ids", tasking(lambda split, tasks: tasks + tasks[:1])),
    ("stable_tasks", tasking(lambda split, tasks: [replace(t, difficulty=next(TICK)) for t in tasks])),
    ("disjoint", tasking(lambda split, tasks: [replace(t, id=t.id[-1]) for t in tasks])),
    ("task_split", tasking(lambda split, tasks: [replace(t, split="train") for t in tasks])),
    ("payload", tasking(lambda split, tasks: [replace(t, payload={"x": {1}}) for t in tasks])),
    ("picture", type("Broken", (Good,), {"picture": lambda self, trajectory, turn: {"kind": "film"}})),
    ("picture", type("Broken", (Good,), {"picture": lambda self, trajectory, turn: trajectory.turns[99]})),
    ("secrets", type("Broken", (Good,), {"secrets": lambda self, task: "up"})),
    ("prompt", resetting(text_reset)),
    ("reset_again", resetting(forgetful_reset)),
    ("reset_again", resetting(broken_reset)),
    ("deterministic", stepping(lambda action, step: replace(step, info={"tick": next(TICK)}))),
    ("bad_action", stepping(explode)),
    ("episode", stepping(lambda action, step: 1 / 0)),
    ("step", stepping(lambda action, step: step.observation)),
    ("observation", stepping(lambda action, step: replace(step, observation=" "))),
    ("reward", stepping(lambda action, step: replace(step, reward=2.0))),
    ("success", stepping(lambda action, step: replace(step, success=True))),
    ("info", stepping(lambda action, step: replace(step, info={"x": {1}}))),
    ("close", type("Broken", (Good,), {"environment": type("E", (Counting,), {"close": close_once})})),
]


class RaisesTheWrongError(Good):
    def tasks(self, split: str) -> list[Task]:
        return {"train": super().tasks("train"), "test": super().tasks("test")}[split]


BROKEN[2] = ("unknown_split", RaisesTheWrongError)


def test_a_correct_environment_conforms() -> None:
    assert check(Good()) == []


@pytest.mark.parametrize(("name", "broken"), BROKEN, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BROKEN)])
def test_each_check_can_fail(name: str, broken: type[Good]) -> None:
    assert name in {problem.check for problem in check(broken())}
    with pytest.raises(AssertionError, match=rf"\[{name}\] expected"):
        assert_conforms(broken())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("preset", PRESETS)
def test_sokoban_conforms(preset: str, style: str) -> None:
    assert_conforms(load("sokoban", {"preset": preset, "style": style}), episodes=2)


def test_the_example_conforms() -> None:
    run = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True)
    assert "conforms" in run.stdout
    assert_conforms(runpy.run_path(str(EXAMPLE))["GuessNumber"](), actions=["3", "16"])
