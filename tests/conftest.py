"""Shared fixtures: a tiny random model, made here in a second, and short runs with it. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that tries to use a hub must fail at once

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from toy_env import Toy
from toy_run import MakeRun, toy_settings

from skillsd.config import ArchitectureSection, RunConfig

MOVES = ("Up", "Down", "Left", "Right")


@pytest.fixture(autouse=True)
def _one_thread():
    """Results are bit-identical only with the same number of threads, and the cores may be few."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama whose tokenizer has a token for each of Sokoban's terse words."""
    from skillsd.warm_start.new_model import make_model

    folder = tmp_path_factory.mktemp("tiny-model")
    cells = [f"r{row}c{column}" for row in range(6) for column in range(6)]
    words = [f"{sign}{cell}" for sign in "#.$*@+" for cell in cells]
    words += [*MOVES, "Sokoban:", "Workflow:", "Mistake:", "never", "loop", "Invalid", "Solved", "Over"]
    texts = [f" {word}" for word in words] * 2
    architecture = ArchitectureSection(hidden_size=32, layers=2, heads=4, intermediate_size=64, max_length=256)
    make_model(folder, architecture, texts, MOVES, seed=0)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A pretrained model with its tokenizer. Tests that use it are skipped unless it has been fetched before."""
    from skillsd.engines.torch import pretrained

    folder = pretrained.kept(pretrained.SMOLLM2)
    if folder is None:
        pytest.skip("smollm2-135m is not installed; to get it: skillsd models fetch smollm2-135m")
    return folder


@pytest.fixture
def make_run(tiny_model: Path, tmp_path: Path) -> Iterator[MakeRun]:
    """`make_run(folder="run", toy=None, **sections)` builds a run; every run is closed at the end."""
    from skillsd.runs.build import build
    from skillsd.training.run import Run

    made: list[Run] = []

    def make(folder: str = "run", toy: Toy | None = None, **sections: Any) -> Run:
        (tmp_path / folder).mkdir(exist_ok=True)
        config = RunConfig.model_validate(toy_settings(tiny_model, **sections))
        made.append(build(config, tmp_path / folder, task_set=toy or Toy()))
        return made[-1]

    yield make
    for run in made:
        run.close()
