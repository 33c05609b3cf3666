"""Helpers for tests that play AppWorld episodes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from skillsd.envs.appworld import AppWorld
from skillsd.envs.base import Step
from skillsd.types import Task


def task_of(task_set: AppWorld, scenario: str) -> Task:
    return next(task for task in task_set.tasks("train") if task.id.startswith(scenario + "_"))


def solution(task_set: AppWorld, task: Task) -> list[str]:
    return [turn.code for turn in task_set.data.solution(task.id) or ()]


def play(task_set: AppWorld, task: Task, actions: Sequence[str]) -> list[Step]:
    return asyncio.run(task_set.play(task, actions))
