from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from engines import tiny

Folder = Callable[[str], Path]


VLLM_SIZES = {**tiny.GROUPED, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""vLLM's CPU kernels take heads of 32 and some multiples."""


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied embeddings: vLLM's CPU build does not update a tied head."""
    return tiny.write(tmp_path_factory.mktemp("tied"), "Llama", {**VLLM_SIZES, "tie_word_embeddings": True})


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Name of an architecture -> folder with a tiny random model of it."""

    @cache
    def folder(name: str) -> Path:
        kind, options = tiny.ARCHITECTURES[name]
        return tiny.write(tmp_path_factory.mktemp(name), kind, options)

    return folder
