"""The shipped recipes: loaded, validated, and run for an iteration, without the weights of the large models."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engines import tiny
from toy_run import go

from skillsd import config as configs
from skillsd.cli.doctor import FILL
from skillsd.config import RunConfig, SftConfig
from skillsd.engines.torch.estimate import estimate
from skillsd.engines.torch.sizes import Sizes
from skillsd.envs import registry
from skillsd.envs.appworld import paths
from skillsd.errors import UserError
from skillsd.runs.build import build
from skillsd.runs.checks import check_config, engine_spec, workload

PAPER = ["sokoban-qwen3-4b", "appworld-qwen3-4b"]
WARM_STARTS = [
    *("nano-base", "rulebook-base", "rulebook-smollm2-base", "sokoban-smollm2-base", "appworld-smoke-base"),
    "textworld-smoke-base",
]
GIB = 1 << 30


def load(name: str, overrides: list[str] | None = None) -> RunConfig:
    """A recipe; AppWorld's with our own tasks, as the official data can't be downloaded here."""
    ours = []
    if name.startswith("appworld"):
        try:
            ours = [f"environment.options.root={paths.world()}"]
            paths.python()
        except UserError as error:
            pytest.skip(str(error))
    return configs.load(RunConfig, name, [*ours, *(overrides or [])])


@pytest.mark.parametrize("name", configs.recipes())
def test_every_recipe_begins_with_a_comment(name: str) -> None:
    first = (configs.RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    kind = configs.SftConfig if name in WARM_STARTS else RunConfig
    assert configs.load(kind, name).name == name


def test_sokoban_as_in_the_paper() -> None:
    config = configs.load(RunConfig, "sokoban-qwen3-4b")
    task_set = registry.load(config.environment.name, config.environment.options)
    assert (len(task_set.tasks("train")), len(task_set.tasks("test")), task_set.max_turns) == (96, 64, 40)
    assert config.model.name == "Qwen/Qwen3-4B-Instruct-2507"
    assert (config.method, config.objective.lambda_sdl, config.teacher.sync_every) == ("skill-sd", 0.001, 1)
    assert config.curriculum.easy_first


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("method", ["skill-sd", "grpo", "skill-sd-frozen"])
def test_it_fits_on_the_gpu_that_it_names(name: str, method: str) -> None:
    config = load(name, [f"method={method}"])
    check_config(config)
    task_set = registry.load(config.environment.name, config.environment.options)
    sizes = Sizes.of(config.model.name)

    def need(config: RunConfig) -> int:
        return estimate(engine_spec(config), workload(config, task_set.max_turns), sizes, own=1 * GIB).need

    assert 30 * GIB < need(config) < FILL * 79 * GIB
    full = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    assert need(full) > need(config)


def test_scienceworld_fits_on_the_gpu_that_it_names() -> None:
    config = configs.load(RunConfig, "scienceworld-qwen3-4b")
    check_config(config)
    task_set = registry.load(config.environment.name, config.environment.options)
    assert (len(task_set.tasks("train")), task_set.max_turns) == (290, 100)
    assert task_set.slowest_call < config.rollout.step_seconds
    sizes = Sizes.of(config.model.name)
    spec = engine_spec(config)
    assert 30 * GIB < estimate(spec, workload(config, task_set.max_turns), sizes, own=1 * GIB).need < FILL * 79 * GIB


def test_textworld_smoke_plays_what_its_base_was_trained_on() -> None:
    base, run = configs.load(SftConfig, "textworld-smoke-base"), configs.load(RunConfig, "textworld-smoke")
    assert base.environment == run.environment
    assert run.model.name == f"models/{base.name}"
    assert (base.warm_start.template, base.warm_start.place) == (run.skills.template, run.skills.place)


def test_sokobans_budgets_hold_a_whole_episode() -> None:
    """With the longest prompt and observations, two characters per token, and a skill in addition."""
    config = configs.load(RunConfig, "sokoban-qwen3-4b")
    task_set = registry.load(config.environment.name, config.environment.options)

    async def longest() -> tuple[int, int]:
        prompts, answers = [], []
        environment = task_set.make()
        for task in task_set.tasks("train")[::8]:
            prompts.append(sum(len(message.content) for message in await environment.reset(task, 0)))
            answers += [len((await environment.step(text)).observation) for text in ("Up", "Left", "what?")]
        return max(prompts), max(answers)

    prompt, answer = asyncio.run(longest())
    template = 12  # tokens that a chat template adds per turn
    rollout = config.rollout
    whole = prompt / 2 + task_set.max_turns * (answer / 2 + rollout.turn_tokens + template)
    assert whole < rollout.trajectory_tokens
    assert whole + config.skills.teacher_extra_tokens < Sizes.of(config.model.name).hidden * 100  # the context: 262,144


def test_appworlds_budgets_hold_a_whole_episode() -> None:
    """The longest prompt, and 40 turns of half-length observations and code of the usual length."""
    config = load("appworld-qwen3-4b")
    task_set: Any = registry.load(config.environment.name, config.environment.options)
    prompt = max(sum(len(message.content) for message in task_set.prompt(task)) for task in task_set.tasks("train"))
    observation, code = task_set.max_observation_chars / 4, 100  # outputs have about 4 characters per token
    assert prompt / 3 + task_set.max_turns * (observation / 2 + code + 12) < config.rollout.trajectory_tokens
    assert observation + config.rollout.turn_tokens < config.rollout.trajectory_tokens / 20


def test_appworld_as_in_the_paper() -> None:
    config = configs.load(RunConfig, "appworld-qwen3-4b")
    assert config.environment.options["root"] == "official"
    assert config.environment.options["max_turns"] == 40
    assert (config.method, config.objective.lambda_sdl, config.teacher.sync_every) == ("skill-sd", 0.001, 1)
    assert config.evaluation.split == "dev"


@pytest.mark.parametrize("name", PAPER)
def test_an_iteration_with_a_tiny_model(name: str, tmp_path: Path) -> None:
    """One iteration of the recipe, with a random two-layer Qwen3 and fewer and shorter episodes."""
    kind, sizes = tiny.ARCHITECTURES["qwen3"]
    model = tiny.write(tmp_path / "model", kind, {**sizes, "max_position_embeddings": 4096})
    config = load(
        name,
        [
            f"model.name={model}", "model.device=cpu", "model.dtype=float32", "rollout.tasks_per_iteration=2",
            "rollout.group_size=3", "rollout.turn_tokens=2", "rollout.trajectory_tokens=2048",
            "training.iterations=1", "evaluation.limit=1", "log.tensorboard=false",
        ],
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    run: Any = build(config, tmp_path / "run")
    try:
        easiest = sorted(task.difficulty for task in run.task_set.tasks("train"))
        listener = go(run)
    finally:
        run.close()
    [record] = listener.iterations
    assert [len(group.trajectories) for group in listener.groups] == [3, 3]
    if config.curriculum.easy_first:
        assert max(group.task.difficulty for group in listener.groups) <= easiest[len(easiest) // 2]
    for group in listener.groups:
        for trajectory in group.trajectories:
            assert len(trajectory.tokens) <= 2048
            assert len(trajectory.tokens) == len(trajectory.action_mask) == len(trajectory.logprobs)
            assert 0 < trajectory.action_tokens <= 2 * 40
    assert record["episodes"] == 6
