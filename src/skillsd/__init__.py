"""Skill-SD: skill-conditioned self-distillation for multi-turn LLM agents (arXiv 2604.10674).

    import skillsd

    config = skillsd.load_recipe("sokoban-nano", "training.iterations=12")
    run = skillsd.train(config, out="runs/mine")
    print(skillsd.evaluate(run, limit=64).accuracy, run.metrics[-1]["rollout/reward"])

Importing this package is light: torch and transformers are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from skillsd.envs.base import Environment, Step, TaskSet
    from skillsd.errors import UserError
    from skillsd.evaluation.evaluate import Evaluation
    from skillsd.runs.api import evaluate, evaluate_async, load_recipe, train, train_async
    from skillsd.runs.opened import OpenRun, open_run
    from skillsd.skills.bank import Bank
    from skillsd.types import Message, Skill, Task, Trajectory

_WHERE = {
    "Bank": "skillsd.skills.bank",
    "Environment": "skillsd.envs.base",
    "Evaluation": "skillsd.evaluation.evaluate",
    "Message": "skillsd.types",
    "OpenRun": "skillsd.runs.opened",
    "Skill": "skillsd.types",
    "Step": "skillsd.envs.base",
    "Task": "skillsd.types",
    "TaskSet": "skillsd.envs.base",
    "Trajectory": "skillsd.types",
    "UserError": "skillsd.errors",
    "evaluate": "skillsd.runs.api",
    "evaluate_async": "skillsd.runs.api",
    "load_recipe": "skillsd.runs.api",
    "open_run": "skillsd.runs.opened",
    "train": "skillsd.runs.api",
    "train_async": "skillsd.runs.api",
}

__all__ = [
    "Bank",
    "Environment",
    "Evaluation",
    "Message",
    "OpenRun",
    "Skill",
    "Step",
    "Task",
    "TaskSet",
    "Trajectory",
    "UserError",
    "__version__",
    "evaluate",
    "evaluate_async",
    "load_recipe",
    "open_run",
    "train",
    "train_async",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'skillsd' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
