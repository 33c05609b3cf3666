"""`skillsd eval`: a run's checkpoints, a model here, or a model behind an endpoint plays a panel."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from skillsd import config as configs
from skillsd.config import EndpointSection, RunConfig
from skillsd.endpoint import Endpoint
from skillsd.engines.base import Engine
from skillsd.envs import registry
from skillsd.errors import UserError
from skillsd.report import manifest
from skillsd.report.progress import Bars, duration
from skillsd.report.tables import percent, table
from skillsd.report.writer import write_whole
from skillsd.rollouts.episode import Budget
from skillsd.training import checkpoint
from skillsd.training.evaluate import Evaluation
from skillsd.training.kept import KeptEpisodes
from skillsd.training.scoring import (
    Subject,
    as_record,
    beside,
    is_run,
    load_trained,
    load_untrained,
    score,
    started,
)
from skillsd.types import Trajectory

NAMES = {
    "model": "--model",
    "base_url": "--endpoint",
    "api_key_env": "--key-env",
    "budget_tokens": "--budget-tokens",
}
"""What the settings of an endpoint are called here."""


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
    """Play, show a table, write the records.

    Args:
        run: a run's folder; or `model`, a name or folder, with `recipe` for the environment and the budgets.
        endpoint: where `model` is remote: settings of `skillsd.config.EndpointSection`.
        at: iterations of the run's checkpoints; the last one if there are none.
        temperatures: the recipe's and 0 if there are none.
        episodes: file to keep finished episodes in, and to go on from; for a remote model there always is one.
    """
    counts: Counter[str] = Counter()
    options: EndpointSection | None = None
    checkpoints: list[Path | None] = [None]
    engine: Engine | None = None
    if run is not None:
        if not is_run(run):
            raise UserError(f"{run!r} is not a run's folder. For a model: skillsd eval --model NAME --recipe RECIPE")
        if recipe or overrides:
            raise UserError("a run brings its own recipe: leave out --recipe and KEY=VALUE")
        wanted = [checkpoint.find(Path(run), iteration) for iteration in dict.fromkeys(at)]
        checkpoints = [*(wanted or [checkpoint.find(Path(run))])]
        engine, config = load_trained(run, at[0] if at else None)
        subject, name = Subject.local(engine, config), run
        identity: dict[str, Any] = {**manifest.model(config.model.name), "run": started(Path(run))}
    else:
        if model is None:
            raise UserError("what shall play? Give a run's folder, or --model NAME and --recipe RECIPE")
        if recipe is None:
            raise UserError(f"--recipe says which environment {model!r} shall play, and with which budgets")
        if at:
            raise UserError("--at is for a run's checkpoints, not for a model")
        config, name = configs.load(RunConfig, recipe, overrides), model
        registry.load(config.environment.name, config.environment.options).tasks(split)  # told before a model is loaded
        if endpoint is not None:
            options = configs.build(EndpointSection, {**endpoint, "model": model}, where="--endpoint")
            remote = Endpoint(options, counts, NAMES)
            subject = Subject.remote(remote)
            identity = {"name": model, "endpoint": remote.address, "request": options.request}
            episodes = episodes or Path("runs") / f"eval-{_as_file(model)}-{config.environment.name}-{split}.jsonl"
        else:
            engine = load_untrained(model, config)
            subject, identity = Subject.local(engine, config), manifest.model(model)
    task_set = registry.load(config.environment.name, config.environment.options)
    tasks = len(task_set.tasks(split)[:limit])
    kept = _kept(episodes, subject, config, split, identity) if episodes else None
    if kept is not None:
        counts.update(kept.spent)
    warmths = list(dict.fromkeys(temperatures)) or [config.rollout.temperature, 0.0]
    plays = [(path, temperature) for path in checkpoints for temperature in warmths]
    total = tasks * sum(samples if temperature else 1 for _, temperature in plays)
    if kept:
        console.print(f"{len(kept)} finished episodes in {kept.path}", highlight=False)
    results: list[tuple[int | None, Evaluation]] = []
    bars, done = Bars(console), 0
    try:
        with bars.shown():
            loaded = checkpoints[0]
            for path, temperature in plays:
                if engine and path and path != loaded:
                    engine.load(path)
                    loaded = path
                iteration = checkpoint.number(path) if path else None

                def on_episode(
                    trajectory: Trajectory, iteration: int | None = iteration, temperature: float = temperature
                ) -> None:
                    nonlocal done
                    done += 1
                    bars.update(f"playing {split}", done, total, _spent(counts, options) if options else "")
                    if kept is not None:
                        kept.add(iteration, temperature, trajectory, counts)

                before = dict(kept.of(iteration, temperature)) if kept is not None else {}
                here = tasks * (samples if temperature else 1)
                done += min(len(before), here)
                results.append(
                    (
                        iteration,
                        score(
                            subject, config, split, temperature=temperature, samples=samples, limit=limit,
                            kept=before, on_episode=on_episode,
                        ),
                    )
                )  # fmt: skip
    except (UserError, KeyboardInterrupt):
        if kept:
            console.print(f"{len(kept)} of {total} episodes are in {kept.path}: the same command goes on from there")
        raise
    finally:
        if kept is not None:
            kept.close(counts)
        if engine is not None:
            engine.close()
    _show(console, results, name, config, split)
    if options is not None:
        console.print(_spent(counts, options), highlight=False)
    if json_out:
        spent = (
            {"spent": {**counts, "cost": options.cost(counts["tokens_in"], counts["tokens_out"])}} if options else {}
        )
        known = {key: value for key, value in identity.items() if key != "run"}
        records = [
            as_record(result, subject, config, model=known, run=run, iteration=iteration, samples=samples) | spent
            for iteration, result in results
        ]
        write_whole(json_out, json.dumps(beside(records, json_out) if append else records, indent=2))


def _kept(path: Path, subject: Subject, config: RunConfig, split: str, identity: Mapping[str, Any]) -> KeptEpisodes:
    task_set = registry.load(config.environment.name, config.environment.options)
    budget = Budget.of(config.rollout, task_set, subject.max_length)
    settings = {
        "model": {key: value for key, value in identity.items() if key != "endpoint"},  # it may move
        "environment": config.environment.model_dump(),
        "split": split,
        "panel": task_set.fingerprint(split),
        "seed": config.seed,
        "budget": [budget.turns, budget.turn_tokens, budget.trajectory_tokens],
        "chat_template_kwargs": config.model.chat_template_kwargs,
    }
    return KeptEpisodes(path, settings)


def _show(
    console: Console, results: Sequence[tuple[int | None, Evaluation]], name: str, config: RunConfig, split: str
) -> None:
    several = len({iteration for iteration, _ in results}) > 1
    rows = [
        [
            *([str(iteration)] if several else []),
            "greedy" if result.temperature == 0 else f"sampled at {result.temperature:g}",
            percent(result.accuracy, result.interval),
            percent(result.completion, result.completion_interval),
            f"{result.episodes:,}",
            f"{result.mean_turns:.1f}",
            duration(result.seconds),
        ]
        for iteration, result in results
    ]
    columns = ["", "accuracy [95 %]", "completion [95 %]", "episodes", "turns", "took"]
    first = results[0][1]
    console.print(
        table(
            f"{name} on {config.environment.name}, split {split}",
            ["iteration", *columns] if several else columns,
            rows,
            f"Intervals over {first.tasks} tasks; panel {first.fingerprint}",
        )
    )
    for _, result in results:
        if short := result.outcomes.get("truncated_tokens"):
            why = "ended for want of tokens (rollout.trajectory_tokens, or the model's context)"
            console.print(f"{short} of {result.episodes} episodes {why}", highlight=False)
        if dropped := result.successes.count(None):
            why = "are left out: an episode of theirs broke in every try"
            console.print(f"{dropped} tasks {why}; with the same --episodes they are tried again", highlight=False)


def _spent(counts: Mapping[str, int], options: EndpointSection) -> str:
    cost = options.cost(counts["tokens_in"], counts["tokens_out"])
    money = "" if cost is None else f", cost {cost:,.4f}"
    return f"{counts['calls']:,} calls, {counts['tokens_in']:,} tokens in, {counts['tokens_out']:,} out{money}"


def _as_file(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
