"""`skillsd sft`: the warm start, and a check of whether the new model follows skills."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from skillsd import config as configs
from skillsd.config import CheckSection, SftConfig
from skillsd.engines.base import Engine
from skillsd.engines.torch.options import TorchOptions
from skillsd.envs import registry
from skillsd.envs.base import TaskSet, evenly_spaced
from skillsd.errors import UserError
from skillsd.evaluation.evaluate import evaluate
from skillsd.files.write import make_folder, write_whole
from skillsd.prompting.renderer import ChatRenderer
from skillsd.prompting.templates import Place, load_template, render_skill
from skillsd.report.manifest import commit, processor, versions
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.seeds import derive_seed
from skillsd.types import Task, Trajectory
from skillsd.warm_start import sft


def run_sft(
    config: SftConfig,
    folder: Path,
    on_step: Callable[[sft.SftProgress], None],
    on_check: Callable[[int, int], None] = lambda done, episodes: None,
) -> list[dict[str, Any]]:
    """Train into `folder`, and evaluate on the split of the section ``check``.

    The recipe and the results (`skill_following`) are written next to the weights.

    Raises:
        UserError: if the folder is not empty, or the training fails.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} is not empty: give another folder with --out")
    task_set = registry.load(config.environment.name, config.environment.options)
    registry.tasks_of(task_set, config.check.split, "check.split")  # before the training, not after it
    task_set.check_machine()
    make_folder(folder)
    begin, cpu = time.perf_counter(), time.process_time()
    losses: list[float] = []

    def record(progress: sft.SftProgress) -> None:
        losses.append(progress.loss)
        on_step(progress)

    try:
        trained = asyncio.run(sft.train(config, task_set, folder, record))
    except BaseException:  # nothing is trained, and what is there would block the next attempt
        shutil.rmtree(folder, ignore_errors=True)
        raise
    engine = Engine(trained, trained, "torch", TorchOptions.capabilities)
    spent = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    figures = skill_following(
        engine,
        task_set,
        config.check,
        config.warm_start.template,
        config.warm_start.place,
        seed=config.seed,
        template_kwargs=config.model.chat_template_kwargs,
        on_check=on_check,
    )
    report = {
        "figures": figures,
        "split": config.check.split,
        "fingerprint": task_set.fingerprint(config.check.split),
        "demonstrations": sft.demonstrations_fingerprint(config, task_set),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "last_loss": sum(losses[-50:]) / len(losses[-50:]),
        **spent,
        "processor": processor(),
        "commit": commit(),
        "versions": versions(),
    }
    write_whole(folder / "warm_start.json", json.dumps(report, indent=2))
    write_whole(folder / "recipe.yaml", configs.dump(config))
    return figures


def skill_following(
    engine: Engine,
    task_set: TaskSet,
    check: CheckSection,
    template: str,
    place: Place,
    *,
    seed: int,
    template_kwargs: Mapping[str, Any] | None = None,
    on_check: Callable[[int, int], None] = lambda done, episodes: None,
) -> list[dict[str, Any]]:
    """Success under the plain prompt, with a golden skill, and with another task's golden skill.

    The gap between the first two is what a skill-conditioned teacher can teach. The third shows whether the model reads
    the skill, rather than profiting from having any.

    Args:
        template, place: how a skill is rendered, and where it stands in the prompt.
        on_check: called with (finished episodes, all episodes) after each episode.

    Returns:
        A row per prompt; only the plain one if a task has no `TaskSet.golden_skill`.
    """
    tasks = list(evenly_spaced(task_set.tasks(check.split), check.limit))
    words = load_template(template)
    skills = [skill for task in tasks if (skill := task_set.golden_skill(task))]
    prompts: list[tuple[str, Callable[[Task], str] | None]] = [("plain", None)]
    if len(skills) == len(tasks):
        texts = [render_skill(skill, words) for skill in skills]
        half = len(tasks) // 2
        golden = {task.id: text for task, text in zip(tasks, texts, strict=True)}
        others = {task.id: text for task, text in zip(tasks, texts[half:] + texts[:half], strict=True)}
        prompts += [
            ("golden skill", lambda task: golden[task.id]),
            ("another task's skill", lambda task: others[task.id]),
        ]
    done, episodes = 0, len(prompts) * len(tasks) * (check.samples + 1)

    def count(_: Trajectory) -> None:
        nonlocal done
        done += 1
        on_check(done, episodes)

    budget = Budget(turns=task_set.max_turns, turn_tokens=check.turn_tokens, trajectory_tokens=engine.max_length)
    renderer = ChatRenderer(engine.tokenizer, engine.stop_tokens, template_kwargs, place=place, tools=task_set.tools)
    rows = []
    for name, context in prompts:
        sampled, greedy = (
            asyncio.run(
                evaluate(
                    EnginePolicy(engine, renderer, temperature),
                    task_set,
                    check.split,
                    budget,
                    seed=derive_seed(seed, "skill following"),
                    samples=check.samples if temperature else 1,
                    limit=check.limit,
                    concurrency=check.concurrency,
                    context=context,
                    on_episode=count,
                )
            )
            for temperature in (1.0, 0.0)
        )
        rows.append(
            {"prompt": name, "sampled": sampled.accuracy, "interval": sampled.interval, "greedy": greedy.accuracy}
        )
    return rows
