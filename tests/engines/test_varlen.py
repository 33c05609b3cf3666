"""Attention by a kernel that knows lengths, against the padded layout. On a CPU a plain function stands in for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.tiny import DATA, chosen, embedded, torch_engine
from skillsd.engines.base import TrainItem
from skillsd.engines.conformance.kit import WEIGHTED
from skillsd.engines.torch import varlen
from skillsd.engines.torch.attention import PackedPlan

Found = tuple[Tensor, Tensor, Tensor, Tensor]


def plain_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: varlen.Layout, scale: float, window: int | None
) -> Tensor:
    """What flash attention computes, sequence by sequence, queries and keys aligned at their ends."""
    outs = []
    repeats = query.shape[1] // key.shape[1]
    queries, keys = layout.queries.tolist(), layout.keys.tolist()
    assert layout.queries.dtype == layout.keys.dtype == torch.int32
    for i in range(len(queries) - 1):
        q = query[queries[i] : queries[i + 1]]
        k, v = (x[keys[i] : keys[i + 1]].repeat_interleave(repeats, dim=1) for x in (key, value))
        assert 0 < len(q) <= layout.longest_query
        assert len(q) <= len(k) <= layout.longest_key
        place, other = torch.arange(len(k))[-len(q) :, None], torch.arange(len(k))
        seen = other <= place
        if window is not None:
            seen &= other > place - window
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outs)


def _attend(
    lengths: list[int], shared: list[int], heads: tuple[int, int], window: int | None, *, device: str, dtype: Any,
    kernel_for: Any,
) -> Found:  # fmt: skip
    """Output and the gradients of queries, keys and values of random states."""
    generator = torch.Generator().manual_seed(1)
    plan = PackedPlan(lengths, torch.device(device), shared, kernel_for)
    tokens, dim = plan.positions.shape[1], 8
    q, k, v, direction = (
        torch.randn(tokens, count, dim, generator=generator).to(device, dtype)
        for count in (heads[0], heads[1], heads[1], heads[0])
    )
    for x in (q, k, v):
        x.requires_grad_()
    out = plan.attend(0, q, k, v, 0.3, window)
    out.backward(direction)
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return out.detach(), q.grad, k.grad, v.grad


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths, and the prefix that each sequence shares with the one before: as `micro_batches` gives them."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=7))
    shared = [0]
    for before, length in pairwise(lengths):
        shared.append(draw(st.integers(0, min(before, length))))  # all of it: no tokens of its own
    return lengths, shared


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layout=layouts(), heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]), window=st.none() | st.integers(1, 9))
def test_any_layout(layout: tuple[list[int], list[int]], heads: tuple[int, int], window: int | None) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float64}
    padded = _attend(*layout, heads, window, kernel_for=lambda *_: None, **options)
    ragged = _attend(*layout, heads, window, kernel_for=lambda *_: plain_kernel, **options)
    for ours, reference in zip(ragged, padded, strict=True):
        assert torch.allclose(ours, reference, rtol=0, atol=1e-5)  # gradients are added up in float32


def test_sequences_without_shared_prefixes_are_not_copied() -> None:
    seen: list[Tensor] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        seen.extend((query, key, value))
        return plain_kernel(query, key, value, *rest)

    plan = PackedPlan([3, 5, 1], torch.device("cpu"), None, lambda *_: spy)
    states = [torch.randn(9, 2, 8) for _ in range(3)]
    plan.attend(0, *states, 0.3, None)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in states]
    assert "_padded" not in vars(plan)  # nothing is prepared for the padded layout


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "deepseek-v3", "gpt2"])
def test_scores_and_gradients_of_models(
    name: str, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = DATA.sequences()

    def both() -> tuple[list[Tensor], dict[str, Tensor]]:
        engine = embedded(model_folder(name))
        items = [TrainItem(s, {"weight": torch.linspace(-1, 1, s.marked)}) for s in sequences]
        asyncio.run(engine.learner.forward_backward(items, WEIGHTED))
        grads = {n: p.grad.clone() for n, p in torch_engine(engine).model.named_parameters() if p.grad is not None}
        return chosen(engine, sequences), grads

    scores, grads = both()
    monkeypatch.setattr(varlen, "kernel_for", lambda *_: plain_kernel)
    ragged_scores, ragged_grads = both()
    for ours, reference in zip(ragged_scores, scores, strict=True):
        assert torch.allclose(ours, reference, rtol=0, atol=1e-5)
    for parameter, reference in grads.items():
        assert torch.allclose(ragged_grads[parameter], reference, rtol=1e-4, atol=1e-5), parameter


def test_without_a_kernel_sequences_are_padded(caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU silently. On a GPU with a note, once."""
    assert varlen.kernel_for(torch.zeros(3, 2, 8), torch.zeros(3, 2, 8), 0.3, None) is None

    class OnGpu:
        device, dtype = torch.device("cuda"), torch.bfloat16

        def __init__(self, width: int) -> None:
            self.shape = (3, 2, width)

    states: Any = OnGpu(192), OnGpu(128)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert varlen.kernel_for(*states, 0.3, None) is None
    assert [record.message for record in caplog.records] == [
        "no variable-length attention for heads of width 192, 128: sequences are padded to the longest, which is slower"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_the_kernel_of_torch(heads: tuple[int, int], window: int | None) -> None:
    layout = [5, 30, 30, 12, 130, 131], [0, 4, 30, 0, 7, 130]
    reference = _attend(*layout, heads, window, device="cpu", dtype=torch.float32, kernel_for=lambda *_: plain_kernel)
    for kernel_for in (varlen.kernel_for, lambda *_: None):
        found = _attend(*layout, heads, window, device="cuda", dtype=torch.bfloat16, kernel_for=kernel_for)
        for ours, expected in zip(found, reference, strict=True):
            # With a window of 1 the gradient of queries is 0, up to rounding.
            assert (ours.cpu().float() - expected).abs().max() < 0.03 * expected.abs().max() + 1e-5
