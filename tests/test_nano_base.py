"""The shipped tiny agent is what its recipe promises: weak alone, strong with a good skill, and reading it."""

from __future__ import annotations

import json

import pytest

from skillsd import config as configs
from skillsd.config import CheckSection, SftConfig
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.models import SHIPPED
from skillsd.envs import load
from skillsd.warm_start.check import skill_following

MAX_BYTES = 8 << 20


def test_it_follows_a_skill_and_plays_weakly_without():
    task_set = load("sokoban", {"preset": "nano"})
    rows = {
        row["prompt"]: row["sampled"]
        for row in skill_following(TorchEngine("nano"), task_set, CheckSection(samples=1), "teacher_terse", seed=1)
    }
    assert 0.1 < rows["plain"] < 0.4
    assert rows["golden skill"] > 0.9
    # It reads the skill: another level's does not help.
    assert rows["another task's skill"] < rows["plain"] + 0.1


def test_it_is_small_and_says_how_it_was_made():
    folder = SHIPPED["nano"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MAX_BYTES
    made_by = configs.load(SftConfig, str(folder / "recipe.yaml"))
    assert made_by == configs.load(SftConfig, "nano-base")
    report = json.loads((folder / "warm_start.json").read_text())
    assert report["parameters"] < 1_000_000
    task_set = load("sokoban", {"preset": "nano"})
    assert report["fingerprint"] == task_set.fingerprint(report["split"]), "the panels changed: `make nano-base`"


@pytest.mark.slow
def test_the_warm_start_of_the_recipe_can_be_repeated(tmp_path):
    """The first steps of the recipe, twice: the same losses to the last bit."""
    from skillsd.training import sft

    config = configs.load(SftConfig, "nano-base", ["warm_start.steps=3"])
    task_set = load("sokoban", {"preset": "nano"})
    losses: list[list[float]] = []
    for attempt in range(2):
        seen: list[float] = []
        (tmp_path / str(attempt)).mkdir()
        sft.train(config, task_set, tmp_path / str(attempt), lambda progress, seen=seen: seen.append(progress.loss))
        losses.append(seen)
    assert losses[0] == losses[1]
