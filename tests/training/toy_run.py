"""Small runs over the toy environment and the random two-layer model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from toy_env import Toy

from skillsd.config import RunConfig
from skillsd.training.loop import train
from skillsd.training.run import Run, build


def toy_settings(model: Path, **sections: Mapping[str, Any] | str | int) -> dict[str, Any]:
    """Settings of a run of seconds; `sections` are laid over them."""
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
    """A reporter that keeps everything."""

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
    """Train to the end."""
    listener = Listener()
    assert asyncio.run(train(run, listener))
    return listener


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tiny_model: Path, tmp_path: Path) -> Any:
    """`make_run(folder="run", toy=None, **sections)`; every run is closed at the end."""
    made: list[Run] = []

    def make(folder: str = "run", toy: Toy | None = None, **sections: Any) -> Run:
        (tmp_path / folder).mkdir(exist_ok=True)
        config = RunConfig.model_validate(toy_settings(tiny_model, **sections))
        made.append(build(config, tmp_path / folder, task_set=toy or Toy()))
        return made[-1]

    yield make
    for run in made:
        run.close()
