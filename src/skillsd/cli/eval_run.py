"""`skillsd eval`: evaluate a run's checkpoints, a local model, or a model behind an endpoint on a split."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.engines.base import Engine
from skillsd.engines.endpoint import Endpoint
from skillsd.engines.endpoint_options import EndpointOptions
from skillsd.envs import registry
from skillsd.errors import UserError
from skillsd.evaluation.episode_log import EpisodeLog
from skillsd.evaluation.evaluate import Evaluation
from skillsd.files.write import write_whole
from skillsd.report import manifest
from skillsd.report.progress import Bars, duration
from skillsd.report.tables import percent, table
from skillsd.rollouts.policy import Budget
from skillsd.runs.build import load_task_set
from skillsd.runs.lifecycle import is_run
from skillsd.runs.subjects import (
    Subject,
    as_record,
    evaluate_subject,
    load_trained,
    load_untrained,
    replace_records,
    started,
)
from skillsd.training import checkpoint
from skillsd.types import Trajectory

NAMES = {
    "model": "--model",
    "base_url": "--endpoint",
    "api_key_env": "--key-env",
    "budget_tokens": "--budget-tokens",
}
"""Endpoint setting -> command-line option, for error messages."""


ODD_ANSWERS = {
    "answers_refused": "were refusals of the model or of the server's content filter",
    "answers_empty": "were empty, some after thinking: a higher rollout.turn_tokens may help",
    "answers_tool_calls": "were turned into tool calls by the server, and their text lost",
}
"""Count of `skillsd.engines.endpoint.Endpoint` -> what it means, for a remote model."""


Results = list[tuple[int | None, Evaluation]]
"""(iteration of the checkpoint, results) of each finished pass."""


@dataclass
class _Case:
    """What is evaluated.

    Attributes:
        identity: identifies the model; equal identities mean the same model.
        checkpoints: the run's checkpoints to evaluate, the first one already loaded; [None] for a model.
        options: the endpoint's settings; None for a local model.
        counts: calls and tokens spent at the endpoint.
    """

    subject: Subject
    config: RunConfig
    name: str
    identity: dict[str, Any]
    checkpoints: list[Path | None]
    engine: Engine | None = None
    options: EndpointOptions | None = None
    counts: Counter[str] = field(default_factory=Counter)


def run_eval(
    console: Console,
    *,
    run: str | None,
    model: str | None,
    endpoint: Mapping[str, Any] | None,
    recipe: str | None,
    overrides: Sequence[str],
    split: str,
    samples: int,
    limit: int | None,
    at: Sequence[int],
    temperatures: Sequence[float],
    episodes: Path | None,
    json_out: Path | None,
    append: bool,
) -> None:
    """Evaluate, print a table and write the records. If a pass fails, the finished ones are still shown and written.

    Args:
        run: a run's folder; otherwise give `model` and `recipe`.
        model: a model's name or folder, or its name at the endpoint.
        endpoint: fields of `skillsd.engines.endpoint_options.EndpointOptions`, for a remote model.
        recipe: recipe with the environment and the token budgets for `model`.
        at: iterations of the run's checkpoints; empty: the last one.
        temperatures: empty: the recipe's and 0.
        episodes: log finished episodes in this file and resume from it. A remote model always has such a file.
    """
    _check_apart(episodes, json_out)
    if json_out and append:
        replace_records([], json_out)  # a damaged file is reported now, not after the episodes
    if run is not None:
        if not is_run(run):
            raise UserError(f"{run!r} is not a run's folder. For a model: skillsd eval --model NAME --recipe RECIPE")
        if recipe or overrides:
            raise UserError("a run has its own recipe: leave out --recipe and KEY=VALUE")
        case = _of_run(run, at)
    elif model is None:
        raise UserError("nothing to evaluate: pass a run folder, or --model and --recipe")
    elif recipe is None:
        raise UserError(f"--recipe is missing: it gives the environment and the budgets for {model!r}")
    elif at:
        raise UserError("--at is for a run's checkpoints, not for a model")
    else:
        config = configs.load(RunConfig, recipe, overrides)
        task_set = load_task_set(config)
        registry.tasks_of(task_set, split, "--split")  # before a model is loaded
        task_set.check_machine()
        if endpoint is not None and episodes is None:
            episodes = Path("runs") / f"eval-{_as_file(model)}-{config.environment.name}-{split}.jsonl"
            _check_apart(episodes, json_out)
        case = _of_model(model, config) if endpoint is None else _of_endpoint(model, config, endpoint)
    temperatures = list(dict.fromkeys(temperatures)) or [case.config.rollout.temperature, 0.0]
    log = _episode_log(episodes, case, split, limit) if episodes else None
    results: Results = []
    try:
        _play(console, case, log, temperatures, results, split=split, samples=samples, limit=limit)
    finally:
        try:
            if case.engine is not None:
                case.engine.close()
            if results:  # of the finished passes, even if a later one failed
                _show(console, results, case, split)
                if json_out:
                    _write(json_out, results, case, run=run, samples=samples, append=append)
        finally:
            if log is not None:
                log.close(case.counts)


def _check_apart(episodes: Path | None, json_out: Path | None) -> None:
    if episodes and json_out and episodes.resolve() == json_out.resolve():
        raise UserError(
            f"{str(json_out)!r} is given for both the results (--json) and the episodes (--episodes): give two files"
        )


def _of_run(run: str, at: Sequence[int]) -> _Case:
    wanted = [checkpoint.find(Path(run), iteration) for iteration in dict.fromkeys(at)]
    engine, config = asyncio.run(load_trained(run, at[0] if at else None))
    identity = {**manifest.model(config.model.name), "run": started(Path(run))}
    checkpoints = [*(wanted or [checkpoint.find(Path(run))])]
    return _Case(Subject.local(engine, config), config, run, identity, [*checkpoints], engine)


def _of_model(model: str, config: RunConfig) -> _Case:
    engine = asyncio.run(load_untrained(model, config))
    identity: dict[str, Any] = {**manifest.model(model)}
    if adapter := config.model.adapter:  # by its weights: the folder's content may change
        identity["adapter"] = manifest.adapter(adapter)
    return _Case(Subject.local(engine, config), config, model, identity, [None], engine)


def _of_endpoint(model: str, config: RunConfig, settings: Mapping[str, Any]) -> _Case:
    options = configs.build(EndpointOptions, {**settings, "model": model}, where="--endpoint")
    counts: Counter[str] = Counter()
    endpoint = Endpoint(options, counts, NAMES)
    identity = {"name": model, "endpoint": endpoint.address, "request": options.request}
    return _Case(Subject.remote(endpoint, config), config, model, identity, [None], options=options, counts=counts)


def _play(
    console: Console,
    case: _Case,
    log: EpisodeLog | None,
    temperatures: Sequence[float],
    results: Results,
    *,
    split: str,
    samples: int,
    limit: int | None,
) -> None:
    """Evaluate every checkpoint at every temperature; append to `results` as passes finish."""
    tasks = len(load_task_set(case.config).tasks(split)[:limit])
    total = len(case.checkpoints) * sum(tasks * (samples if temperature else 1) for temperature in temperatures)
    if log is not None:
        case.counts.update(log.spent)
        if log:
            console.print(f"{len(log)} finished episodes in {log.path}", highlight=False)
    bars, done = Bars(console), 0
    try:
        with bars.shown():
            for path, temperature in itertools.product(case.checkpoints, temperatures):
                if case.engine and path and results and temperature == temperatures[0]:
                    asyncio.run(checkpoint.load_weights(case.engine, path))
                iteration = checkpoint.number(path) if path else None

                def on_episode(
                    episode: Trajectory, iteration: int | None = iteration, temperature: float = temperature
                ) -> None:
                    nonlocal done
                    done += 1
                    bars.update(f"evaluating {split}", done, total, _spent(case))
                    if log is not None:
                        log.add(iteration, temperature, episode, case.counts)

                before = dict(log.of(iteration, temperature)) if log is not None else {}
                done += min(len(before), tasks * (samples if temperature else 1))
                figures = asyncio.run(
                    evaluate_subject(
                        case.subject, case.config, split, temperature=temperature, samples=samples, limit=limit,
                        finished=before, on_episode=on_episode,
                    )
                )  # fmt: skip
                results.append((iteration, figures))
    except BaseException:
        if log:
            console.print(f"{len(log)} of {total} episodes are in {log.path}: the same command resumes from there")
        raise


def _episode_log(path: Path, case: _Case, split: str, limit: int | None) -> EpisodeLog:
    config = case.config
    task_set = load_task_set(config)
    budget = Budget.of(config.rollout, task_set, case.subject.max_length)
    settings = {
        "model": {key: value for key, value in case.identity.items() if key != "endpoint"},
        "split": split,
        "panel": task_set.fingerprint(split),
        "limit": limit,  # episode seeds depend on a task's position among the evaluated ones
        "seed": config.seed,
        "budget": [budget.turns, budget.turn_tokens, budget.trajectory_tokens],
        "settings": case.subject.settings,
        "versions": case.subject.versions,
    }
    return EpisodeLog(path, settings)


def _write(path: Path, results: Results, case: _Case, *, run: str | None, samples: int, append: bool) -> None:
    spent = {"spent": {**case.counts, "cost": _cost(case)}} if case.options else {}
    known = {key: value for key, value in case.identity.items() if key != "run"}
    records = [
        as_record(figures, case.subject, case.config, model=known, run=run, iteration=iteration, samples=samples)
        | spent
        for iteration, figures in results
    ]
    write_whole(path, json.dumps(replace_records(records, path) if append else records, indent=2))


def _show(console: Console, results: Results, case: _Case, split: str) -> None:
    several = len({iteration for iteration, _ in results}) > 1
    rows = [
        [
            *([str(iteration)] if several else []),
            "greedy" if result.temperature == 0 else f"sampled at {result.temperature:g}",
            percent(result.accuracy, result.interval),
            percent(result.completion, result.completion_interval),
            *([percent(result.scenario_accuracy)] if result.scenario_accuracy is not None else []),
            f"{result.episodes:,}",
            f"{result.mean_turns:.1f}",
            duration(result.seconds),
        ]
        for iteration, result in results
    ]
    first = results[0][1]
    scenarios = ["whole scenarios"] if first.scenario_accuracy is not None else []
    columns = ["", "accuracy [95 %]", "completion [95 %]", *scenarios, "episodes", "turns", "took"]
    console.print(
        table(
            f"{case.name} on {case.config.environment.name}, split {split}",
            ["iteration", *columns] if several else columns,
            rows,
            f"Intervals over {first.tasks} tasks; fingerprint {first.fingerprint}",
        )
    )
    for _, result in results:
        if short := result.outcomes.get("truncated_tokens"):
            why = "ran out of tokens (rollout.trajectory_tokens, or the model's context)"
            console.print(f"{short} of {result.episodes} episodes {why}", highlight=False)
        if dropped := result.successes.count(None):
            why = "are excluded: one of their episodes failed in every attempt"
            console.print(
                f"{dropped} tasks {why}. With the same --episodes file they are attempted again", highlight=False
            )
    if case.options:
        for name, what in ODD_ANSWERS.items():
            if count := case.counts[name]:
                console.print(f"{count} answers {what}", highlight=False)
        console.print(_spent(case), highlight=False)


def _cost(case: _Case) -> float | None:
    return case.options.cost(case.counts["tokens_in"], case.counts["tokens_out"]) if case.options else None


def _spent(case: _Case) -> str:
    """Calls, tokens and cost of a remote model; empty for a local one."""
    if case.options is None:
        return ""
    cost = _cost(case)
    calls, tokens = case.counts["calls"], [case.counts[f"tokens_{way}"] for way in ("in", "out")]
    money = "" if cost is None else f", cost {cost:,.4f}"
    return f"{calls:,} calls, {tokens[0]:,} tokens in, {tokens[1]:,} out{money}"


def _as_file(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
