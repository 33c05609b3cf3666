"""Prefixes that sequences share are computed once, and nothing else changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.tiny import ARCHITECTURES, Plain, chosen, embedded, torch_engine
from skillsd.engines.base import Engine, TokenSequence, TrainItem
from skillsd.engines.conformance.kit import WEIGHTED
from skillsd.engines.torch.micro_batches import common_prefix, micro_batches

Folder = Callable[[str], Path]


def _sequence(tokens: tuple[int, ...], prompt: int) -> TokenSequence:
    return TokenSequence(tokens, tuple(place >= prompt and place % 3 != 2 for place in range(len(tokens))))


def _ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(30, 256), k=count))


def _groups() -> list[TokenSequence]:
    """Two groups, with members that diverge at once, later or never, one a prefix of another; and a sequence alone."""
    a, b = _ids(20, 1), _ids(7, 2)
    played = _ids(9, 3)
    sequences = [
        _sequence((*a, *_ids(11, 4)), 20),
        _sequence((*a, *played, *_ids(5, 5)), 20),
        _sequence((*a, *played, *_ids(12, 6)), 20),
        _sequence((*a, *played), 20),
        _sequence((*a, *played), 20),
        _sequence((*b, *_ids(3, 7)), 7),
        _sequence((*b, *_ids(30, 8)), 7),
        _sequence(_ids(25, 9), 4),
    ]
    random.Random(0).shuffle(sequences)
    return sequences


def _gradients(engine: Engine, sequences: list[TokenSequence]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    weights = [torch.rand(s.marked, generator=generator) - 0.3 for s in sequences]
    batch = [TrainItem(s, {"weight": w}) for s, w in zip(sequences, weights, strict=True)]
    asyncio.run(engine.learner.forward_backward(batch, WEIGHTED))
    learner = torch_engine(engine)
    found = {name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None}
    learner.optimiser.zero_grad()
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_and_gradients_are_those_of_each_sequence_alone(name: str, model_folder: Folder) -> None:
    plain, sequences = Plain(model_folder(name)), _groups()
    engine = embedded(model_folder(name))
    for sequence, score in zip(sequences, chosen(engine, sequences), strict=True):
        places = torch.tensor(sequence.mask).nonzero().squeeze(1)
        expected = plain.logprobs(sequence.tokens)[places - 1, torch.tensor(sequence.tokens)[places]]
        assert torch.allclose(score, expected, rtol=0, atol=1e-5)
    together = _gradients(engine, sequences)
    one_by_one = _gradients(embedded(model_folder(name), micro_batch_tokens=1), sequences)
    for gradient_name, alone in one_by_one.items():
        scale = alone.abs().max().item()
        assert torch.allclose(together[gradient_name], alone, rtol=0, atol=2e-5 * max(scale, 1.0)), gradient_name


def test_shared_tokens_are_computed_once(model_folder: Folder) -> None:
    engine, sequences = embedded(model_folder("llama")), _groups()
    seen: list[int] = []
    model: Any = torch_engine(engine).model
    model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    chosen(engine, sequences)
    distinct = {s.tokens[: length + 1] for s in sequences for length in range(len(s.tokens))}
    assert seen == [len(distinct)]  # one computation for all tokens with the same history


TREES = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.sampled_from([40, 41]), min_size=1, max_size=6)), min_size=1, max_size=9
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES, budget=st.integers(1, 60))
def test_any_tree_of_histories_in_any_micro_batches(
    tree: list[tuple[int, list[int]]], budget: int, model_folder: Folder
) -> None:
    engine = embedded(model_folder("qwen3"))
    sequences = [_sequence((*_ids(3 + prompt, prompt), *played), 3 + prompt) for prompt, played in tree]
    learner = torch_engine(engine)
    learner.micro_batches.budget = 1
    alone = chosen(engine, sequences)
    learner.micro_batches.budget = budget
    for ours, expected in zip(chosen(engine, sequences), alone, strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-5)
    assert sorted(i for part, _ in micro_batches(sequences, budget) for i in part) == [
        i for i, sequence in enumerate(sequences) if sequence.marked
    ]


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    length = common_prefix(tuple(a), tuple(b))
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]
