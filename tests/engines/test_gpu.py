"""The conformance checks and one training iteration on a GPU. `make gpu-check`; skipped visibly without one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import tiny
from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.engines.base import Engine
from skillsd.engines.conformance import CHECKS, Check, Subject
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.options import TorchOptions
from skillsd.runs.build import build
from skillsd.training.loop import Record, learn_phase, rollout_phase
from skillsd.training.run import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Kernels sum in another order when the batch size changes: a few more units in the last place than on a CPU.
    "float32": ({}, {"tolerance": 1e-4, "relative": 1e-3, "batch_invariant": False}),
    "bfloat16": ({"dtype": "bfloat16"}, {"tolerance": 0.15, "relative": 0.03, "batch_invariant": False}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_engine_conforms(kind: str, check: Check, model_folder: Callable[[str], Path]) -> None:
    options, exactness = KINDS[kind]
    folder = model_folder("llama")
    plain = tiny.Plain(folder, options.get("dtype", "float32"))

    def make(*, snapshot_teacher: bool = False, micro_batch_tokens: int = 8192) -> Engine:
        engine = TorchEngine(
            str(folder),
            device="cuda",
            teacher_follows=not snapshot_teacher,
            micro_batch_tokens=micro_batch_tokens,
            **options,
        )
        return Engine(engine, engine, "torch", TorchOptions.capabilities)

    tiny.conforms(check, Subject(make, plain.logprobs, **exactness))


class Silent:
    """A reporter that drops everything."""

    iteration = evaluation = trajectories = note = staticmethod(lambda *_: None)


async def _iterate(run: Run) -> Record:
    reporter: Any = Silent()
    await run.engine.publish()
    return await learn_phase(run, await rollout_phase(run, run.iteration, reporter), reporter)


def test_an_iteration_of_the_tiny_recipe(tmp_path: Path) -> None:
    config = configs.load(RunConfig, "sokoban-nano", ["model.device=cuda"])
    run = build(config, tmp_path)
    record = asyncio.run(_iterate(run))
    run.close()
    assert record["step/refused"] == 0
    assert record["sampler_trainer_logprob_diff/p99"] < 1e-3
