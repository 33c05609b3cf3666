"""A trajectory of an invented environment, and ways to vary it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from skillsd.types import Message, Outcome, Skill, Task, Trajectory, Turn

TRAIN = Task("level-1", "maze", "train")
PROMPT = "You are in a maze of four rooms. Find the way out, one door at a time, and answer with a door."
SKILL = Skill("Opening the red door.", "", "Red door, then blue door.")


def make_trajectory(**changes: Any) -> Trajectory:
    turns = tuple(
        Turn(action, f"You went through the {action} door.", 2 * i + 2, 2 * i + 3)
        for i, action in enumerate(["red", "green", "red", "blue"])
    )
    trajectory = Trajectory(
        task=TRAIN,
        prompt=(Message("system", "Be brief."), Message("user", PROMPT)),
        tokens=tuple(range(10)),
        action_mask=tuple(i >= 2 and i % 2 == 0 for i in range(10)),
        logprobs=tuple(-0.1 * (i >= 2 and i % 2 == 0) for i in range(10)),
        prompt_length=2,
        turns=turns,
        outcome=Outcome.SOLVED,
        reward=1.0,
        success=True,
        seed=7,
    )
    return dataclasses.replace(trajectory, **changes)


@pytest.fixture
def trajectory() -> Trajectory:
    return make_trajectory()


@pytest.fixture
def trajectory_with() -> Callable[..., Trajectory]:
    return make_trajectory


@pytest.fixture
def task() -> Task:
    return TRAIN


@pytest.fixture
def skill() -> Skill:
    return SKILL
