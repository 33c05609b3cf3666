"""Captured decode steps against uncaptured and plain ones, on a GPU. `make gpu-check`; skipped visibly without one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engines.schedules import play
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.static_steps import StaticSteps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "llama-untied", "qwen3", "mistral-window", "gemma3", "gpt-neox"])
def test_captured_steps_agree_with_plain_ones(
    name: str, dtype: str, model_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Same tokens in float32, log-probs to 1e-4. In bfloat16 a close choice can tip; log-probs agree to 0.15 before."""
    engine = TorchEngine(str(model_folder(name)), device="cuda", dtype=dtype)
    captured = engine.decoders["student"]
    assert isinstance(captured.steps, StaticSteps)
    found = {}
    with caplog.at_level(logging.WARNING):
        for kind in ("captured", "captured again", "uncaptured", "plain"):
            if kind == "captured again":
                engine.forget_caches()
                engine._release()
            elif not kind.startswith("captured"):
                engine.decoders["student"] = engine._decoder("student", "plain" if kind == "plain" else "static", 64)
                if kind == "uncaptured":
                    engine.decoders["student"].steps._graphs = None  # type: ignore[attr-defined]
            found[kind] = asyncio.run(play(engine, episodes=12, seed=1))
    graphs = captured.steps._graphs
    assert graphs is not None
    assert not graphs.failed, caplog.text
    assert graphs._graphs
    assert not caplog.records
    for kind in ("captured again", "uncaptured", "plain"):
        for ours, theirs in zip(found["captured"], found[kind], strict=True):
            for (token, logprob), (other, expected) in zip(ours, theirs, strict=False):
                if token != other:
                    assert dtype == "bfloat16", kind
                    break
                assert logprob == pytest.approx(expected, abs=1e-4 if dtype == "float32" else 0.15), kind


def test_weights_change_in_place_under_the_graphs(model_folder: Callable[[str], Path]) -> None:
    engine = TorchEngine(str(model_folder("llama")), device="cuda", teacher_follows=False)
    before = asyncio.run(play(engine, episodes=4, seed=3))
    engine.forget_caches()
    with torch.no_grad():
        for parameter in engine.trainable.values():
            parameter.mul_(1.1)
    after = asyncio.run(play(engine, episodes=4, seed=3))
    engine.decoders["student"] = engine._decoder("student", "plain", 64)
    plain = asyncio.run(play(engine, episodes=4, seed=3))
    assert [[t for t, _ in episode] for episode in after] == [[t for t, _ in episode] for episode in plain]
    assert after != before
