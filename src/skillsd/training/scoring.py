"""What `skillsd eval` plays: a run's checkpoints, or any model, on a panel; and its records."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.endpoint import Endpoint
from skillsd.engines.base import Engine
from skillsd.envs import registry
from skillsd.rollouts.chat import ChatActor
from skillsd.rollouts.episode import Actor, Budget, Player
from skillsd.rollouts.tokens import ChatRenderer
from skillsd.seeds import derive_seed
from skillsd.training import checkpoint
from skillsd.training.evaluate import Evaluation, evaluate
from skillsd.training.run import make_engine
from skillsd.training.session import CONFIG
from skillsd.types import Trajectory


def is_run(target: str) -> bool:
    """Whether `target` is the folder of a training run."""
    return (Path(target) / CONFIG).is_file()


def load_trained(folder: str, iteration: int | None = None) -> tuple[Engine, RunConfig]:
    """The engine with the weights of a run's checkpoint (the last one, if none is asked for), and its configuration.

    Raises:
        UserError: if the run has no such checkpoint.
    """
    config = configs.load(RunConfig, str(Path(folder) / CONFIG))
    path = checkpoint.find(Path(folder), iteration)
    engine = make_engine(config)
    engine.load(path)
    return engine, config


def load_untrained(model: str, config: RunConfig) -> Engine:
    """The engine of `config` with another model's weights."""
    changes = {"name": model, "lora": None}
    return make_engine(config.model_copy(update={"model": config.model.model_copy(update=changes)}))


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a player for each temperature, and the most tokens that it takes."""

    at: Callable[[float], Player]
    max_length: int

    @classmethod
    def local(cls, engine: Engine, config: RunConfig) -> Subject:
        """An engine's student under the plain prompt."""
        renderer = ChatRenderer(engine.tokenizer, engine.stop_tokens, config.model.chat_template_kwargs)
        return cls(lambda temperature: Actor(engine, renderer, temperature), engine.max_length)

    @classmethod
    def remote(cls, endpoint: Endpoint) -> Subject:
        """A model behind an endpoint, which says itself what is too long for it."""
        return cls(lambda temperature: ChatActor(endpoint, temperature), sys.maxsize)


def score(
    subject: Subject,
    config: RunConfig,
    split: str,
    *,
    temperature: float,
    samples: int = 1,
    limit: int | None = None,
    kept: Mapping[int, Trajectory] | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> Evaluation:
    """Play a split under the plain prompt (at temperature 0: greedily, once a task). No bank is opened.

    Environment, budgets and seed are `config`'s.

    Args:
        kept, on_episode: as of `skillsd.rollouts.collect.collect`.
    """
    task_set = registry.load(config.environment.name, config.environment.options)
    return asyncio.run(
        evaluate(
            subject.at(temperature),
            task_set,
            split,
            Budget.of(config.rollout, task_set, subject.max_length),
            seed=derive_seed(config.seed, "final evaluation"),
            samples=samples if temperature > 0 else 1,
            limit=limit,
            retries=config.rollout.retries,
            concurrency=config.rollout.concurrency,
            kept=kept,
            on_episode=on_episode,
        )
    )


def as_record(
    figures: Evaluation,
    subject: Subject,
    config: RunConfig,
    *,
    model: Mapping[str, Any],
    run: str | None,
    iteration: int | None,
    samples: int,
) -> dict[str, Any]:
    """An evaluation as JSON says it: its figures, those of each task, and all that makes them comparable or not.

    Args:
        model: the base model (`skillsd.report.manifest.model`) with its adapter, or a remote one with its endpoint.
        run: the folder of the run that was evaluated; None for a model that is not a run's.
        iteration: of the run's checkpoint.
    """
    task_set = registry.load(config.environment.name, config.environment.options)
    budget = Budget.of(config.rollout, task_set, subject.max_length)
    return {
        **figures.with_tasks(),
        "iteration": iteration,
        "samples": samples if figures.temperature > 0 else 1,
        "seed": config.seed,
        "budget": {
            "turns": budget.turns,
            "turn_tokens": budget.turn_tokens,
            "trajectory_tokens": budget.trajectory_tokens,
        },
        "model": dict(model),
        "run": started(Path(run)) if run else None,
    }


_IDENTITY = ("run", "iteration", "split", "fingerprint", "samples", "temperature", "seed", "budget")


def beside(records: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """`records`, after those in the file that are of other evaluations."""
    new = {_identity(record) for record in records}
    return [*(record for record in read_records(path) if _identity(record) not in new), *records]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records that `skillsd eval --json` wrote; none if there is no such file, or it holds something else."""
    if not path.is_file():  # a device would wait for something to read
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []


def _identity(record: Mapping[str, Any]) -> str:
    """What an evaluation is of; another one with the same takes its place. The same endpoint may have moved."""
    model = record.get("model")
    known = {key: value for key, value in model.items() if key != "endpoint"} if isinstance(model, dict) else model
    return json.dumps([known, *(record.get(key) for key in _IDENTITY)], sort_keys=True)


def started(folder: Path) -> str | None:
    """When a run was begun, as its manifest says: two runs in one folder, one after the other, are not the same."""
    try:
        return str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["started"])
    except (OSError, ValueError, KeyError):
        return None
