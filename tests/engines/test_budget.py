"""training.micro_batch_tokens=auto."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.tiny import DATA, embedded, torch_engine
from skillsd.engines.base import Engine, TrainItem
from skillsd.engines.conformance.kit import WEIGHTED
from skillsd.engines.torch import budget
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.optimiser import MasterAdamW
from skillsd.engines.torch.options import TorchOptions
from skillsd.engines.torch.sizes import Sizes

GIB = 1 << 30
SIZES = Sizes.of("Qwen/Qwen3-4B-Instruct-2507")


@given(free=st.integers(-10 * GIB, 200 * GIB), lora=st.booleans(), recomputed=st.booleans())
def test_tokens_that_fit(free: int, lora: bool, recomputed: bool) -> None:
    tokens = budget.tokens_that_fit(free, SIZES, 2, lora=lora, recomputed=recomputed)
    assert budget.LEAST <= tokens <= budget.MOST
    assert tokens & (tokens - 1) & ((tokens & (tokens - 1)) - 1) == 0  # 2 ** n or 1.5 * 2 ** n
    if tokens > budget.LEAST:
        assert tokens * budget.kept_per_token(SIZES, 2, lora=lora, recomputed=recomputed) < free - budget.LOGITS
    assert budget.tokens_that_fit(free + GIB, SIZES, 2, lora=lora, recomputed=recomputed) >= tokens


def test_recomputation_leaves_room_for_more() -> None:
    plain = budget.tokens_that_fit(30 * GIB, SIZES, 2, lora=False, recomputed=False)
    assert budget.tokens_that_fit(30 * GIB, SIZES, 2, lora=False, recomputed=True) > 4 * plain


def test_a_number_stays_and_auto_on_a_cpu_is_fixed(model_folder: Callable[[str], Path]) -> None:
    for given_budget, expected in ((40, 40), ("auto", 8192)):
        engine = embedded(model_folder("llama"), micro_batch_tokens=given_budget)
        assert torch_engine(engine).micro_batches.budget == expected


def test_on_a_gpu_memory_for_gradients_and_moments_is_kept_free(
    monkeypatch: pytest.MonkeyPatch, model_folder: Callable[[str], Path]
) -> None:
    weight = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2)
    model: Any = SimpleNamespace(parameters=lambda: iter([weight]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GIB)
    asked: list[int] = []
    monkeypatch.setattr(budget, "tokens_that_fit", lambda free, *rest, **more: asked.append(free) or 5000)
    trained = torch.nn.Parameter(torch.zeros(1000))
    optimiser = MasterAdamW([trained], betas=(0.9, 0.95), weight_decay=0.0)
    find = budget.budget_of("auto", model, str(model_folder("llama")), optimiser, None, False)
    assert find() == 5000
    trained.grad = torch.zeros(1000)
    find()
    optimiser.step(1e-3)
    optimiser.zero_grad()
    find()
    assert asked == [33 * GIB - 12_000, 33 * GIB - 8_000, 33 * GIB - 4_000]


def _gradients(engine: Engine) -> list[torch.Tensor]:
    items = [TrainItem(s, {"weight": torch.linspace(-1, 1, s.marked)}) for s in DATA.sequences()]
    asyncio.run(engine.learner.forward_backward(items, WEIGHTED))
    return [master.grad.cpu() for master in torch_engine(engine).optimiser.masters if master.grad is not None]


def _same(ours: list[torch.Tensor], others: list[torch.Tensor], relative: float) -> None:
    assert len(ours) == len(others) > 0
    for one, other in zip(ours, others, strict=True):
        assert (one - other).norm() <= relative * other.norm() + 1e-6


def test_the_gradient_does_not_depend_on_it(
    monkeypatch: pytest.MonkeyPatch, model_folder: Callable[[str], Path]
) -> None:
    expected = _gradients(embedded(model_folder("llama"), micro_batch_tokens=8192))
    for tokens in (1, 35, 60):
        monkeypatch.setattr(budget, "ON_CPU", tokens)
        _same(_gradients(embedded(model_folder("llama"), micro_batch_tokens="auto")), expected, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "relative"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_auto_on_a_gpu(dtype: str, relative: float, model_folder: Callable[[str], Path]) -> None:
    def make(tokens: Any) -> Engine:
        engine = TorchEngine(str(model_folder("llama")), device="cuda", dtype=dtype, micro_batch_tokens=tokens)
        return Engine(engine, engine, "torch", TorchOptions.capabilities)

    auto = make("auto")
    assert torch_engine(auto).micro_batches.budget == budget.MOST  # a tiny model
    _same(_gradients(auto), _gradients(make(40)), relative)
