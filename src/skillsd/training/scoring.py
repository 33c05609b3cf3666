"""`skillsd eval`: a run's last checkpoint, or any model, on a panel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.engines.base import Engine
from skillsd.envs import registry
from skillsd.errors import UserError
from skillsd.rollouts.episode import Actor, Budget
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


def load_trained(folder: str) -> tuple[Engine, RunConfig]:
    """The engine with the weights of a run's last checkpoint, and the run's configuration."""
    config = configs.load(RunConfig, str(Path(folder) / CONFIG))
    newest = checkpoint.latest(Path(folder))
    if newest is None:
        raise UserError(f"the run {folder!r} has no checkpoint yet")
    engine = make_engine(config)
    engine.load(newest)
    return engine, config


def load_untrained(model: str, config: RunConfig) -> Engine:
    """The engine of `config` with another model's weights."""
    changes = {"name": model, "lora": None}
    return make_engine(config.model_copy(update={"model": config.model.model_copy(update=changes)}))


def score(
    engine: Engine,
    config: RunConfig,
    split: str,
    *,
    samples: int = 1,
    limit: int | None = None,
    temperatures: Sequence[float] = (1.0, 0.0),
    seed: int | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> list[Evaluation]:
    """Play a split under the plain prompt at each temperature (0: greedily, once a task). No bank is opened.

    Environment, budgets and seed are `config`'s.
    """
    task_set = registry.load(config.environment.name, config.environment.options)
    task_set.tasks(split)
    options = config.rollout
    budget = Budget.of(options, task_set, engine.max_length)
    renderer = ChatRenderer(engine.tokenizer, engine.stop_tokens)
    return [
        asyncio.run(
            evaluate(
                Actor(engine, renderer, temperature),
                task_set,
                split,
                budget,
                seed=derive_seed(config.seed if seed is None else seed, "final evaluation"),
                samples=samples if temperature > 0 else 1,
                limit=limit,
                concurrency=options.concurrency,
                on_episode=on_episode,
            )
        )
        for temperature in temperatures
    ]
