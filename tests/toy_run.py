"""Short runs on the toy environment with the random two-layer model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skillsd.training.loop import train
from skillsd.training.run import Run

CLOCKS = ("time/", "memory/", "seconds", "rollout/sampled_tokens_per_second", "eval/seconds", "eval_greedy/seconds")
"""Beginnings of the metrics that depend on the clock or the memory."""


def toy_settings(model: Path, /, **sections: Mapping[str, Any] | str | int) -> dict[str, Any]:
    """Settings of a run that takes seconds, updated with `sections`."""
    settings: dict[str, Any] = {
        "name": "toy",
        "method": "skill-sd",
        "model": {"name": str(model), "device": "cpu", "threads": 1},
        "environment": {"name": "toy_env:Toy"},
        "rollout": {"tasks_per_iteration": 3, "group_size": 4, "turn_tokens": 2, "trajectory_tokens": 48},
        "objective": {"lambda_sdl": 0.1},
        "skills": {"template": "teacher_terse", "teacher_extra_tokens": 64},
        "training": {"iterations": 6, "learning_rate": 3e-3, "minibatches": 2},
        "evaluation": {"split": "tune", "every": 2},
        "checkpoint": {"every": 2},
        "log": {"tensorboard": False},
    }
    for name, value in sections.items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, Mapping) else value
    return settings


class Listener:
    """A reporter that keeps everything in memory."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.groups: list[Any] = []
        self.notes: list[str] = []

    def iteration(self, record: dict[str, Any]) -> None:
        self.iterations.append(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self.evaluations.append(record)

    def trajectories(self, iteration: int, groups: Any) -> None:
        self.groups += groups

    def note(self, text: str) -> None:
        self.notes.append(text)


def go(run: Run) -> Listener:
    """Train to the last iteration."""
    listener = Listener()
    assert asyncio.run(train(run, listener))
    return listener


def without_clocks(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records without the metrics that depend on the clock or the memory."""
    return [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in records]


MakeRun = Callable[..., Run]
"""The fixture `make_run`: (folder="run", toy=None, **sections of the settings) -> a run, not started."""
