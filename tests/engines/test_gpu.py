"""The same contract on a GPU, and one training iteration there. `make gpu-check`; skipped visibly without a GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import tiny
from engines.conformance import CHECKS, Subject
from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.engines.torch.engine import TorchEngine
from skillsd.training.loop import iterate
from skillsd.training.run import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Kernels for another batch size sum in another order: a few more units in the last place than on a CPU.
    "float32": ({}, {"tolerance": 1e-4, "relative": 1e-3, "batch_invariant": False}),
    "bfloat16": ({"dtype": "bfloat16"}, {"tolerance": 0.15, "relative": 0.03, "batch_invariant": False}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_contract(kind: str, check: Callable[[Subject], None], model_folder: Callable[[str], Path]) -> None:
    options, exactness = KINDS[kind]
    folder = model_folder("llama")
    plain = tiny.Plain(folder, options.get("dtype", "float32"))

    def make(**more: Any) -> TorchEngine:
        return TorchEngine(str(folder), device="cuda", **options, **more)

    check(Subject(make, plain.logprobs, **exactness))


def test_an_iteration_of_the_tiny_recipe(tmp_path: Path) -> None:
    config = configs.load(RunConfig, "sokoban-nano", ["model.device=cuda"])
    run = build(config, tmp_path)

    class Silent:
        iteration = evaluation = trajectories = note = staticmethod(lambda *_: None)

    record = asyncio.run(iterate(run, Silent()))  # type: ignore[arg-type]
    run.close()
    assert record["step/refused"] == 0
    assert record["gap/p99"] < 1e-3
