"""The runs of a sweep: base model x method x seed, each with its complete configuration. All are checked before any
starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.envs import registry
from skillsd.errors import UserError, unknown_name
from skillsd.files.write import write_whole
from skillsd.methods import METHODS
from skillsd.runs.checks import check_config
from skillsd.sweeps.variants import BASE, LABEL, OWN, assignment, load_variants
from skillsd.training import checkpoint

DEFAULT_METHODS = ("grpo", "skill-sd")

_BUDGETS = "budgets.json"
"""File in a sweep's folder: all budgets requested so far, whose checkpoints are kept."""


@dataclass(frozen=True)
class Cell:
    """One run of the sweep, or one evaluation of an untrained base model.

    Attributes:
        model, method, seed: the cell's labels. The method may be a variant's label, or `BASE`.
        folder: the run's folder. Its log and evaluations are next to it.
        config: the run's complete configuration; for `BASE` the recipe's, used for the evaluation.
        overrides: settings that turn the recipe into `config`.
        iterations: of each budget, in the order of the sweep's budgets; empty for `BASE`.
    """

    model: str
    method: str
    seed: int
    folder: Path
    config: RunConfig
    overrides: tuple[str, ...]
    iterations: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.model}/{self.method}/{self.folder.name}"

    @property
    def trained(self) -> bool:
        return self.method != BASE

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def evaluation(self, split: str) -> Path:
        """The file with the cell's evaluations on a split."""
        return self.folder.with_name(f"{self.folder.name}.{split}.json")


@dataclass(frozen=True)
class Sweep:
    """The cells to compare, and how they are evaluated.

    Attributes:
        out: the sweep's folder.
        models: label -> name or path of a base model.
        methods: labels in the order of the table, `BASE` first.
        budgets: training episodes, ascending; one table per budget.
        split: the split to evaluate on.
        samples: sampled episodes per task.
        limit: tabulate only this many of the split's tasks, evenly spaced.
        against: the method that the others are compared with.
        panels: seed -> split -> fingerprint of its tasks, for every split of the environment. The seeds' differ only if
            the recipe gives each seed an environment of its own (``$seed``).
        tasks: number of tasks in `split`.
    """

    recipe: str
    overrides: tuple[str, ...]
    out: Path
    models: Mapping[str, str]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    split: str
    samples: int
    limit: int | None
    against: str
    cells: tuple[Cell, ...]
    config: RunConfig
    panels: Mapping[int, Mapping[str, str]]
    tasks: int

    @property
    def fingerprint(self) -> str:
        """Of the tabulated tasks."""
        panels = ", ".join(dict.fromkeys(of_seed[self.split] for of_seed in self.panels.values()))
        return panels + (f":{self.limit} spread" if self.limit else "")


def plan(
    recipe: str,
    overrides: Sequence[str],
    out: Path,
    *,
    methods: Sequence[str] | None = None,
    variants: str | None = None,
    models: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    episodes: Sequence[int] | None = None,
    split: str = "test",
    samples: int = 1,
    limit: int | None = None,
    against: str | None = None,
) -> Sweep:
    """Lay out a sweep and check each of its runs.

    Args:
        overrides: settings for all cells.
        out: the sweep's folder.
        methods: names in `METHODS` and labels of the variants. Default: ``grpo`` and ``skill-sd``.
        variants: a YAML file that maps labels to settings, or the name of a shipped one.
        models: names or paths of base models. Default: the recipe's.
        episodes: budgets. Default: the recipe's length.
        against: the method to compare with. Default: ``grpo`` if it is among the methods, else the first one.

    Raises:
        UserError: for anything that would fail later or could not be compared, one line each.
    """
    if taken := [override for override in overrides if override.partition("=")[0] == "method"]:
        raise UserError(f"{taken[0]!r}: give the methods with --methods")
    for override in overrides:
        key = override.partition("=")[0]
        alone = (key == "model.name" and not models) or (key == "training.iterations" and not episodes)
        if key in OWN and not alone:
            raise UserError(f"{override!r}: {OWN[key]}")
    base = configs.load(RunConfig, recipe, overrides)
    known = load_variants(variants) if variants else {}
    chosen = _chosen(methods, known)
    named = _label_models(models or [base.model.name])
    budgets = tuple(sorted(set(episodes or [base.training.iterations * base.episodes_per_iteration])))
    if min(budgets) < 1:
        raise UserError(f"--episodes is {min(budgets)}: expected a budget of at least one iteration")
    task_set = registry.load(base.environment.name, base.environment.options)
    tasks = len(registry.tasks_of(task_set, split, "--split"))
    if limit and limit > tasks:
        raise UserError(f"--limit is {limit}, but the split {split!r} has {tasks} tasks")

    before = asked(out)
    cells: list[Cell] = []
    problems: dict[str, None] = {}
    for label, model in named.items():
        for seed in seeds:
            for method in (BASE, *chosen):
                folder = out / label / method / f"seed-{seed}"
                settings = known.get(method) or ([("method", method)] if method != BASE else [])
                try:
                    cells.append(
                        _cell(recipe, overrides, label, model, method, seed, folder, settings, budgets, before)
                    )
                except UserError as error:
                    problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        raise UserError("\n".join(problems))
    return Sweep(
        recipe=recipe,
        overrides=tuple(overrides),
        out=out,
        models=named,
        methods=(BASE, *chosen),
        seeds=tuple(seeds),
        budgets=budgets,
        split=split,
        samples=samples,
        limit=limit,
        against=_against(against, chosen),
        cells=tuple(cells),
        config=base,
        panels={seed: _panels(configs.load(RunConfig, recipe, [*overrides, f"seed={seed}"])) for seed in seeds},
        tasks=tasks,
    )


def _panels(config: RunConfig) -> dict[str, str]:
    task_set = registry.load(config.environment.name, config.environment.options)
    return {split: task_set.fingerprint(split) for split in task_set.splits}


def asked(out: Path) -> tuple[int, ...]:
    """The budgets requested so far of the sweep in a folder."""
    try:
        found = json.loads((out / _BUDGETS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return tuple(budget for budget in found if isinstance(budget, int)) if isinstance(found, list) else ()


def remember(sweep: Sweep) -> None:
    """Record the sweep's budgets, so that later calls with other budgets keep their checkpoints."""
    before = asked(sweep.out)
    if set(sweep.budgets) - set(before):
        write_whole(sweep.out / _BUDGETS, json.dumps(sorted({*before, *sweep.budgets})))


def fewest_episodes(config: RunConfig, iterations: int) -> int:
    """The episodes that a run uses at least: what measures uplift or reading needs a skill, which may not be there."""
    return iterations * config.rollout.tasks_per_iteration * config.rollout.group_size


def scheduled_on_length(config: RunConfig) -> str | None:
    """The setting, if any, that makes a run depend on its length, so that its first part differs from a shorter run."""
    options = config.objective
    if options.lambda_schedule != "constant" and METHODS[config.method].teacher != "none":
        return f"objective.lambda_schedule is {options.lambda_schedule!r}"
    if config.curriculum.easy_first:
        return "curriculum.easy_first is true"
    return None


def _chosen(methods: Sequence[str] | None, variants: Mapping[str, Any]) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(name for name in methods or DEFAULT_METHODS if name != BASE))
    for name in chosen:
        if name not in METHODS and name not in variants:
            raise unknown_name("method", name, [*METHODS, *variants])
    return chosen


def _label_models(models: Sequence[str]) -> dict[str, str]:
    from skillsd.engines.torch.models import SHIPPED, local_folder

    named: dict[str, str] = {}
    for model in dict.fromkeys(models):
        path = Path(model).expanduser()
        if model not in SHIPPED:
            local_folder(model)  # report a missing folder now
        label = path.name or path.resolve().name
        if not LABEL.fullmatch(label):
            raise UserError(f"the model {model!r}: {label!r} is not usable as a folder name")
        if label in named:
            raise UserError(f"the models {named[label]!r} and {model!r} have the same label {label!r}: rename a folder")
        named[label] = model
    return named


def _against(given: str | None, chosen: Sequence[str]) -> str:
    if given is None:
        return "grpo" if "grpo" in chosen else (*chosen, BASE)[0]
    if given not in (BASE, *chosen):
        raise unknown_name("method of this table", given, (BASE, *chosen))
    return given


def _cell(
    recipe: str,
    overrides: Sequence[str],
    label: str,
    model: str,
    method: str,
    seed: int,
    folder: Path,
    settings: Sequence[tuple[str, Any]],
    budgets: Sequence[int],
    before: Sequence[int],
) -> Cell:
    own = [assignment(key, value) for key, value in settings]
    own += [assignment("model.name", model), f"seed={seed}"]
    try:
        config = configs.load(RunConfig, recipe, [*overrides, *own])
        if method != BASE:
            check_config(config)
    except UserError as error:
        if method in METHODS or method == BASE:
            raise
        raise UserError("\n".join(f"variant {method!r}: {line}" for line in str(error).splitlines())) from error
    if method == BASE:
        return Cell(label, method, seed, folder, config, (*overrides, *own), ())
    recipes = configs.load(RunConfig, recipe, [*overrides, f"seed={seed}"])
    if _evaluation_settings(config) != _evaluation_settings(recipes):
        raise UserError(
            f"{method!r} is evaluated differently from the recipe (environment, temperature, token budgets or "
            "model.chat_template_kwargs differ), so its results can't be compared with the others'"
        )
    if len(budgets) > 1 and (reason := scheduled_on_length(config)):
        raise UserError(
            f"{method!r}: {reason}, which depends on the run's length, so a checkpoint of a longer run is not the "
            "result of a shorter one. Give a single budget"
        )
    per_iteration = config.episodes_per_iteration
    for budget in budgets:
        iterations = budget // per_iteration
        measured = config.episodes_after(iterations) > iterations * per_iteration
        if (budget % per_iteration and not measured) or not _iterations(config, budget):
            raise UserError(
                f"--episodes is {budget}: not a whole number of iterations of {method!r}, which uses {per_iteration} "
                "episodes per iteration"
            )
    lengths = tuple(_iterations(config, budget) for budget in budgets)
    own.append(f"training.iterations={lengths[-1]}")
    earlier = {_iterations(config, budget) for budget in before} - {0}
    own += _checkpoints(config, sorted({*lengths, *(i for i in earlier if i < lengths[-1])}), folder)
    config = configs.load(RunConfig, recipe, [*overrides, *own])
    return Cell(label, method, seed, folder, config, (*overrides, *own), lengths)


def _iterations(config: RunConfig, budget: int) -> int:
    """The most iterations within a budget of episodes."""
    iterations = budget // config.episodes_per_iteration
    while config.episodes_after(iterations) > budget:
        iterations -= 1
    return iterations


def _evaluation_settings(config: RunConfig) -> tuple[Any, ...]:
    """What an evaluation depends on, apart from the model and the engine."""
    options = config.rollout
    budget = (options.temperature, options.turn_tokens, options.trajectory_tokens)
    return (config.environment, *budget, config.model.chat_template_kwargs)


def _checkpoints(config: RunConfig, iterations: Sequence[int], folder: Path) -> list[str]:
    """Settings that write a checkpoint at each budget and keep it, about as often as the recipe does."""
    if len(iterations) == 1:
        return []
    common = math.gcd(*iterations)
    wanted = config.checkpoint.every or common
    every = max(n for n in range(1, common + 1) if common % n == 0 and n <= max(1, wanted))
    kept = set(range(iterations[0], iterations[-1] + 1, every))
    # Existing checkpoints at other iterations (after an interruption) must not displace a budget's.
    kept |= {iteration for iteration in checkpoint.iterations(folder) if iteration >= iterations[0]}
    return [f"checkpoint.every={every}", f"checkpoint.keep={max(len(kept), config.checkpoint.keep)}"]
