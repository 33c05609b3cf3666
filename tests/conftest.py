"""Models that the tests share: tiny, random, made here in a second; no hub, no download."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub has to fail, not wait

import pytest
import torch

from skillsd.config import ArchitectureSection

MOVES = ("Up", "Down", "Left", "Right")


@pytest.fixture(autouse=True)
def _one_thread():
    """Same bits on every machine size, and no fight over two cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama with a tokenizer that knows Sokoban's terse words."""
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
    """A real pretrained model with a real tokenizer, where it has been fetched; tests fetch nothing unasked."""
    from skillsd.engines.torch import pretrained

    folder = pretrained.kept(pretrained.SMOLLM2)
    if folder is None:
        pytest.skip("smollm2-135m is not here; to fetch it: skillsd models fetch smollm2-135m")
    return folder
