"""The shipped tiny agents: weak under the plain prompt, strong with a good skill, and they read the skill."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from skillsd import config as configs
from skillsd.config import CheckSection, RunConfig, SftConfig
from skillsd.engines.options import EngineSpec
from skillsd.engines.torch.models import SHIPPED
from skillsd.engines.torch.options import TorchOptions
from skillsd.envs import load
from skillsd.runs.build import load_task_set
from skillsd.warm_start import sft
from skillsd.warm_start.check import skill_following

MAX_BYTES = 2 << 20

BASES = [("nano-base", "nano", "sokoban-nano"), ("rulebook-base", "rulebook-nano", "rulebook-nano")]
"""Recipe of the warm start, name of the model, recipe of its runs."""


@pytest.mark.parametrize(
    ("model", "recipe", "plain", "golden"),
    [("nano", "sokoban-nano", (0.1, 0.4), 0.9), ("rulebook-nano", "rulebook-nano", (0.0, 0.05), 0.25)],
)
def test_it_follows_a_skill_and_plays_weakly_without(
    model: str, recipe: str, plain: tuple[float, float], golden: float
) -> None:
    config = configs.load(RunConfig, recipe)
    engine = TorchOptions().build(EngineSpec(model, seed=0, device="cpu"))
    check = CheckSection(samples=1, turn_tokens=config.rollout.turn_tokens)
    measured = skill_following(
        engine, load_task_set(config), check, config.skills.template, config.skills.place, seed=1
    )
    rows = {row["prompt"]: row["sampled"] for row in measured}
    assert plain[0] <= rows["plain"] <= plain[1]
    assert rows["golden skill"] > golden
    # It reads the skill: another task's skill does not help.
    assert rows["another task's skill"] < rows["plain"] + 0.1


@pytest.mark.parametrize(("warm_start", "model", "recipe"), BASES)
def test_it_is_small_and_documents_its_making(warm_start: str, model: str, recipe: str) -> None:
    folder = SHIPPED[model]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MAX_BYTES
    made_by = configs.load(SftConfig, str(folder / "recipe.yaml"))
    place = configs.load(RunConfig, recipe).skills.place  # a run must put a skill where the base has learnt it
    assert made_by == configs.load(SftConfig, warm_start, [f"warm_start.place={place}"])
    report = json.loads((folder / "warm_start.json").read_text())
    assert report["parameters"] < 1_000_000
    task_set = load(made_by.environment.name, made_by.environment.options)
    assert report["fingerprint"] == task_set.fingerprint(report["split"]), f"the tasks changed: run `make {warm_start}`"
    # The demonstrations leave out all held-out tasks, so a base that saw others may have seen one of today's.
    demonstrations = sft.demonstrations_fingerprint(made_by, task_set)
    assert report["demonstrations"] == demonstrations, f"the demonstrations changed: run `make {warm_start}`"


@pytest.mark.slow
@pytest.mark.parametrize(("warm_start", "model", "recipe"), BASES)
def test_the_warm_start_is_reproducible(warm_start: str, model: str, recipe: str, tmp_path: Path) -> None:
    """The first steps of the recipe, twice: bit-identical losses."""
    config = configs.load(SftConfig, warm_start, ["warm_start.steps=3"])
    task_set = load(config.environment.name, config.environment.options)
    losses: list[list[float]] = []
    for attempt in range(2):
        seen: list[float] = []
        (tmp_path / str(attempt)).mkdir()

        def record(progress: sft.SftProgress, seen: list[float] = seen) -> None:
            seen.append(progress.loss)

        asyncio.run(sft.train(config, task_set, tmp_path / str(attempt), record))
        losses.append(seen)
    assert losses[0] == losses[1]
