"""What can be evaluated (a run's checkpoint, a model, or a model behind an endpoint), and records of evaluations."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillsd.config import RunConfig
from skillsd.engines.base import Engine
from skillsd.engines.endpoint import Endpoint
from skillsd.errors import UserError
from skillsd.evaluation.evaluate import Evaluation, evaluate
from skillsd.files.read import DamagedError, read_json
from skillsd.prompting.renderer import ChatRenderer
from skillsd.report import manifest
from skillsd.rollouts.endpoint_policy import EndpointPolicy
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget, Policy
from skillsd.runs.build import load_task_set, make_engine
from skillsd.runs.lifecycle import load_config, read_manifest
from skillsd.seeds import derive_seed
from skillsd.training import checkpoint
from skillsd.types import Trajectory


async def load_trained(folder: str | Path, iteration: int | None = None) -> tuple[Engine, RunConfig]:
    """The engine with the weights of a run's checkpoint (the last one if None), and the run's configuration.

    Raises:
        UserError: if it is not a run's folder, or has no such checkpoint, or the checkpoint is an adapter and the files
            of its base model have changed.
    """
    config = load_config(folder)
    path = checkpoint.find(Path(folder), iteration)
    if (config.model.lora or config.model.adapter) and (
        other := manifest.changed_models(read_manifest(folder), config)
    ):
        raise UserError(
            f"the checkpoints in {str(folder)!r} are adapters, and the files of the {' and the '.join(other)} have "
            "changed since the run was started: restore them"
        )
    engine = make_engine(config)
    await checkpoint.load_weights(engine, path)
    return engine, config


async def load_untrained(model: str, config: RunConfig) -> Engine:
    """The engine of `config` with the weights of `model`, a name or folder."""
    changes = {"name": model, "lora": None}
    engine = make_engine(config.model_copy(update={"model": config.model.model_copy(update=changes)}))
    await engine.publish()
    return engine


def local_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that can change the answers of an evaluation on this machine, as JSON.

    Left out are those that a record has anyway (seed, samples, temperature), and ``retries``, ``step_seconds`` and
    ``concurrency``: these decide which episodes are lost to failures, and lost ones are played again.
    """
    settings = {
        "environment": config.environment.model_dump(),
        "model": config.model.model_dump(exclude={"name", "gradient_checkpointing"}),
        "engine": config.engine.resume_key(),
        "rollout": config.rollout.model_dump(include={"turn_tokens", "trajectory_tokens"}),
    }
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        at: temperature -> policy.
        max_length: the longest trajectory that it takes, in tokens.
        settings: those that can change its answers.
        versions: the packages that can change its answers, with their versions.
    """

    at: Callable[[float], Policy]
    max_length: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str | None]

    @classmethod
    def local(cls, engine: Engine, config: RunConfig) -> Subject:
        """An engine's student under the plain prompt."""
        renderer = ChatRenderer(
            engine.tokenizer, engine.stop_tokens, config.model.chat_template_kwargs, place=config.skills.place,
            tools=load_task_set(config).tools,
        )  # fmt: skip
        return cls(
            lambda temperature: EnginePolicy(engine, renderer, temperature),
            engine.max_length,
            local_settings(config),
            manifest.versions(),
        )

    @classmethod
    def remote(cls, endpoint: Endpoint, config: RunConfig) -> Subject:
        """A model behind an endpoint. It has no `max_length`: the endpoint reports messages that are too long.

        Raises:
            UserError: if the environment has tools.
        """
        if load_task_set(config).tools:
            raise UserError(
                f"the environment {config.environment.name!r} has tools, which models behind an endpoint can't call: "
                "evaluate a model that runs here"
            )
        local = local_settings(config)
        return cls(
            lambda temperature: EndpointPolicy(endpoint, temperature),
            sys.maxsize,
            {part: local[part] for part in ("environment", "rollout")},
            {"skillsd": manifest.versions()["skillsd"]},
        )


async def evaluate_subject(
    subject: Subject,
    config: RunConfig,
    split: str,
    *,
    temperature: float,
    samples: int = 1,
    limit: int | None = None,
    finished: Mapping[int, Trajectory] | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> Evaluation:
    """Play a split under the plain prompt, with the environment, budgets and seed of `config`. No bank is opened.

    Args:
        temperature: 0 decodes greedily, once per task.
        finished, on_episode: see `skillsd.rollouts.collect.collect`.
    """
    task_set = load_task_set(config)
    return await evaluate(
        subject.at(temperature),
        task_set,
        split,
        Budget.of(config.rollout, task_set, subject.max_length),
        seed=derive_seed(config.seed, "final evaluation"),
        samples=samples if temperature > 0 else 1,
        limit=limit,
        retries=config.rollout.retries,
        concurrency=config.rollout.concurrency,
        finished=finished,
        on_episode=on_episode,
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
    """An evaluation as JSON: its results, those per task, and everything that must be equal to compare two evaluations.

    Args:
        model: the base model (`skillsd.report.manifest.model`) with its adapter, or a remote model with its endpoint.
        run: the folder of the evaluated run; None for a model.
        iteration: of the run's checkpoint.
    """
    budget = Budget.of(config.rollout, load_task_set(config), subject.max_length)
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
        "settings": dict(subject.settings),
        "versions": dict(subject.versions),
        "model": dict(model),
        "run": started(Path(run)) if run else None,
    }


_IDENTITY = (
    *("run", "iteration", "split", "fingerprint", "samples", "temperature", "seed", "budget", "settings"),
    "versions",
)


def replace_records(records: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The file's records of other evaluations, followed by `records`.

    Raises:
        DamagedError: if the file holds something else, which writing it would lose.
    """
    new = {_identity(record) for record in records}
    return [*(record for record in _stored(path) if _identity(record) not in new), *records]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records that `skillsd eval --json` wrote; empty if the file does not exist or holds something else."""
    try:
        return _stored(path)
    except DamagedError:
        return []


def _stored(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():  # reading from a device could block
        return []
    remedy = "give another file, or move that one away"
    records = read_json(path, remedy)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DamagedError(path, "holds something else than evaluations", remedy)
    return records


def _identity(record: Mapping[str, Any]) -> str:
    """Identifies an evaluation. The endpoint is left out: the same model may have moved."""
    model = record.get("model")
    known = {key: value for key, value in model.items() if key != "endpoint"} if isinstance(model, dict) else model
    return json.dumps([known, *(record.get(key) for key in _IDENTITY)], sort_keys=True)


def started(folder: Path) -> str | None:
    """When a run was started, from its manifest. It distinguishes runs that used the same folder one after another."""
    time = read_manifest(folder).get("started")
    return None if time is None else str(time)
