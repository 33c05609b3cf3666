"""The Python API, re-exported by `skillsd`. `train` and `evaluate` also work inside a running event loop, such as a
notebook's; each has an async version."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.errors import UserError
from skillsd.evaluation.evaluate import Evaluation
from skillsd.runs.closing import closing
from skillsd.runs.lifecycle import OnRecord, default_folder, is_run, run_training, run_training_async
from skillsd.runs.opened import OpenRun, open_run
from skillsd.runs.subjects import Subject, evaluate_subject, load_trained, load_untrained
from skillsd.runs.sync import run_blocking


def load_recipe(recipe: str | Path | Mapping[str, Any], *overrides: str, **sections: Any) -> RunConfig:
    """Load a recipe and return its configuration.

    Args:
        recipe: a recipe's name (`skillsd recipes`), the path of a YAML file, or a mapping of keys and values.
        overrides: settings that replace the recipe's, as on the command line: ``"training.learning_rate=1e-4"``.
        sections: the same as keyword arguments: ``seed=1``, ``training={"iterations": 10}``.

    Raises:
        UserError: for an unknown recipe, or keys or values that do not fit.
    """
    if isinstance(recipe, Mapping):
        if overrides:
            raise UserError("overrides are for a recipe given by name or path: put them into the mapping")
        config = configs.build(RunConfig, recipe, where="the recipe")
    else:
        config = configs.load(RunConfig, str(recipe), overrides)
    if not sections:
        return config
    data = config.model_dump()
    for name, value in sections.items():
        data[name] = (
            {**data[name], **value} if isinstance(value, Mapping) and isinstance(data.get(name), dict) else value
        )
    return configs.build(RunConfig, data, where="the recipe")


def train(
    recipe: str | Path | RunConfig,
    *overrides: str,
    out: str | Path | None = None,
    resume: bool = False,
    on_record: OnRecord = lambda kind, record: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> OpenRun:
    """Train a policy; returns the run. In the main thread, Ctrl-C stops after the current iteration.

    Args:
        recipe: as for `load_recipe`, or its result.
        overrides: as for `load_recipe`.
        out: the run's folder; ``runs/NAME-METHOD-seedN`` if None.
        resume: continue the folder's run from its last checkpoint.
        on_record: called with ("iteration", its metrics) or ("evaluation", its record).
        on_note: called with messages for the user, at the end with `skillsd.runs.closing.closing`'s.

    Raises:
        UserError: for settings that do not fit, or a folder that holds another run.
    """
    config, folder = _run_of(recipe, overrides, out)
    run_training(config, folder, resume=resume, on_record=on_record, on_note=on_note)
    for line in closing(folder):
        on_note(line)
    return open_run(folder)


async def train_async(
    recipe: str | Path | RunConfig,
    *overrides: str,
    out: str | Path | None = None,
    resume: bool = False,
    on_record: OnRecord = lambda kind, record: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> OpenRun:
    """`train` as a coroutine. Scoring and training on the embedded engine block the event loop."""
    config, folder = _run_of(recipe, overrides, out)
    await run_training_async(config, folder, resume=resume, on_record=on_record, on_note=on_note)
    for line in closing(folder):
        on_note(line)
    return open_run(folder)


def evaluate(
    target: str | Path | OpenRun,
    *,
    recipe: str | Path | RunConfig | None = None,
    split: str = "test",
    samples: int = 1,
    temperature: float | None = None,
    limit: int | None = None,
    iteration: int | None = None,
) -> Evaluation:
    """Accuracy and completion on held-out tasks, under the plain prompt.

    Args:
        target: a run, its folder, or a model's name or folder; a model needs a `recipe` for environment and budgets.
        recipe: as for `load_recipe`, or its result; only for a model.
        split: the tasks to play.
        samples: episodes per task; 1 if decoding is greedy.
        temperature: of sampling; None takes the recipe's, 0 is greedy.
        limit: only this many of the split's tasks, evenly spaced.
        iteration: of a run's checkpoint; the last one if None.

    Raises:
        UserError: if there is no such run, checkpoint, model or split, or a number is out of range.
    """
    return run_blocking(
        evaluate_async(
            target,
            recipe=recipe,
            split=split,
            samples=samples,
            temperature=temperature,
            limit=limit,
            iteration=iteration,
        )
    )


async def evaluate_async(
    target: str | Path | OpenRun,
    *,
    recipe: str | Path | RunConfig | None = None,
    split: str = "test",
    samples: int = 1,
    temperature: float | None = None,
    limit: int | None = None,
    iteration: int | None = None,
) -> Evaluation:
    """`evaluate` as a coroutine. Decoding on the embedded engine blocks the event loop."""
    for argument, value, least in (("samples", samples, 1), ("limit", limit, 1), ("temperature", temperature, 0)):
        if value is not None and not value >= least:
            raise UserError(f"{argument} is {value}; expected {least} or more")
    name = str(target.folder if isinstance(target, OpenRun) else target)
    if is_run(name):
        if recipe is not None:
            raise UserError(f"{name!r} is a run and has its own recipe: leave out `recipe`")
        engine, config = await load_trained(name, iteration)
    elif recipe is None:
        raise UserError(f"{name!r} is not a run's folder; for a model, give a `recipe` for environment and budgets")
    elif iteration is not None:
        raise UserError("`iteration` is for a run's checkpoints, not for a model")
    else:
        config = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe)
        engine = await load_untrained(name, config)
    try:
        return await evaluate_subject(
            Subject.local(engine, config),
            config,
            split,
            temperature=config.rollout.temperature if temperature is None else temperature,
            samples=samples,
            limit=limit,
        )
    finally:
        engine.close()


def _run_of(recipe: str | Path | RunConfig, overrides: Sequence[str], out: str | Path | None) -> tuple[RunConfig, Path]:
    if isinstance(recipe, RunConfig):
        if overrides:
            raise UserError("overrides are for a recipe given by name or path: pass them to load_recipe")
        config = recipe
    else:
        config = load_recipe(recipe, *overrides)
    return config, Path(out) if out is not None else default_folder(config)
