"""The shipped tiny agent: weak under the plain prompt, strong with a good skill, and it reads the skill."""

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
from skillsd.warm_start import sft
from skillsd.warm_start.check import skill_following

MAX_BYTES = 8 << 20


def test_it_follows_a_skill_and_plays_weakly_without() -> None:
    task_set = load("sokoban", {"preset": "nano"})
    skills = configs.load(RunConfig, "sokoban-nano").skills
    engine = TorchOptions().build(EngineSpec("nano", seed=0, device="cpu"))
    rows = {
        row["prompt"]: row["sampled"]
        for row in skill_following(engine, task_set, CheckSection(samples=1), skills.template, skills.place, seed=1)
    }
    assert 0.1 < rows["plain"] < 0.4
    assert rows["golden skill"] > 0.9
    # It reads the skill: another level's skill does not help.
    assert rows["another task's skill"] < rows["plain"] + 0.1


def test_it_is_small_and_documents_its_making() -> None:
    folder = SHIPPED["nano"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MAX_BYTES
    made_by = configs.load(SftConfig, str(folder / "recipe.yaml"))
    place = configs.load(RunConfig, "sokoban-nano").skills.place  # a run must put a skill where the base has learnt it
    assert made_by == configs.load(SftConfig, "nano-base", [f"warm_start.place={place}"])
    report = json.loads((folder / "warm_start.json").read_text())
    assert report["parameters"] < 1_000_000
    task_set = load("sokoban", {"preset": "nano"})
    assert report["fingerprint"] == task_set.fingerprint(report["split"]), "the levels changed: run `make nano-base`"
    # The demonstrations leave out all held-out levels, so a base that saw others may have seen one of today's.
    demonstrations = sft.demonstrations_fingerprint(made_by, task_set)
    assert report["demonstrations"] == demonstrations, "the demonstrations changed: run `make nano-base`"


@pytest.mark.slow
def test_the_warm_start_is_reproducible(tmp_path: Path) -> None:
    """The first steps of the recipe, twice: bit-identical losses."""
    config = configs.load(SftConfig, "nano-base", ["warm_start.steps=3"])
    task_set = load("sokoban", {"preset": "nano"})
    losses: list[list[float]] = []
    for attempt in range(2):
        seen: list[float] = []
        (tmp_path / str(attempt)).mkdir()

        def record(progress: sft.SftProgress, seen: list[float] = seen) -> None:
            seen.append(progress.loss)

        asyncio.run(sft.train(config, task_set, tmp_path / str(attempt), record))
        losses.append(seen)
    assert losses[0] == losses[1]
