"""Logits in chunks: the same values and gradients, with bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines import tiny
from engines.tiny import DATA
from skillsd.engines.base import Engine, TokenSequence, TrainItem
from skillsd.engines.conformance.kit import WEIGHTED, distribution_of
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch import lm_head
from skillsd.metrics import Metrics
from skillsd.objective import WHOLE, TokenLogprobs, Want, top_k

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Llama", {**tiny.GROUPED, "tie_word_embeddings": True}),
    "scaled": ("Granite", {**tiny.GROUPED, "logits_scaling": 3.0}),
    "multiplied": ("Cohere", {**tiny.GROUPED, "logit_scale": 0.25}),
    "soft-capped": ("Gemma3Text", {**tiny.GROUPED, "sliding_window": 9, "final_logit_softcapping": 2.0}),
    "mixture": tiny.ARCHITECTURES["qwen3-moe"],
}


@dataclass(frozen=True)
class Entropic:
    """A loss of the whole distribution, or of candidates and the rest."""

    want: Want

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        full = distribution_of(student)
        return (full.exp() * full).sum() + (signals["weight"] * student.chosen).sum(), {}


async def _everything(engine: Engine) -> list[Tensor]:
    """All log-probs that the engine gives, and the gradients of three losses."""
    learner, sequences, batch = engine.learner, DATA.sequences(), DATA.batch()
    plain = await learner.logprobs(sequences)
    whole = await learner.logprobs(sequences, temperature=0.7, want=WHOLE)
    tops = await learner.logprobs(sequences, temperature=0.7, want=top_k(5))
    found = [one.chosen for one in plain] + [distribution_of(one) for one in whole]
    found += [tensor for one in tops for tensor in (one.chosen, distribution_of(one))]
    coarse = [
        TrainItem(item.sequence, {**item.signals, "candidates": one.candidates})
        for item, one in zip(batch, tops, strict=True)
        if one.candidates is not None
    ]
    for items, loss in ((batch, WEIGHTED), (batch, Entropic(WHOLE)), (coarse, Entropic(top_k(5)))):
        await learner.forward_backward(items, loss, temperature=0.7)
        trained = tiny.torch_engine(engine)
        found += [p.grad.clone() for p in trained.model.parameters() if p.grad is not None]
        trained.optimiser.zero_grad()
    return found


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=4)])
@pytest.mark.parametrize("head", HEADS)
def test_chunks_change_nothing(
    head: str, lora: LoraOptions | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write(tmp_path, *HEADS[head])
    engine = tiny.embedded(folder, lora=lora)
    plain = tiny.Plain(folder)
    for sequence, score in zip(DATA.sequences(), tiny.chosen(engine, DATA.sequences()), strict=True):
        places = torch.tensor(sequence.mask).nonzero().squeeze(1)
        expected = plain.logprobs(sequence.tokens)[places - 1, torch.tensor(sequence.tokens)[places]]
        assert torch.allclose(score, expected, rtol=0, atol=1e-5)
    whole = asyncio.run(_everything(engine))
    monkeypatch.setattr(lm_head, "MAX_LOGITS", 7 * tiny.torch_engine(engine).vocabulary)  # seven tokens at a time
    chunked = asyncio.run(_everything(engine))
    assert len(whole) == len(chunked)
    for one, other in zip(whole, chunked, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=2e-5)


class _Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is computed, backward passes included."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


def _sequence(length: int, marked: int) -> TokenSequence:
    return TokenSequence(tuple(range(30, 30 + length)), (*[False] * (length - marked), *[True] * marked))


def test_no_tensor_holds_the_logits_of_a_whole_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large vocabulary: logits exist for a chunk of the marked tokens, whatever the length of the sequence."""
    vocabulary = 20_000
    options = {**tiny.GROUPED, "vocab_size": vocabulary, "tie_word_embeddings": True, "hidden_size": 8}
    learner = tiny.embedded(tiny.write(tmp_path, "Llama", options)).learner
    monkeypatch.setattr(lm_head, "MAX_LOGITS", 12 * vocabulary)

    async def score_and_train(sequence: TokenSequence) -> None:
        await learner.logprobs([sequence])
        await learner.logprobs([sequence], want=top_k(8))
        await learner.forward_backward([TrainItem(sequence, {"weight": torch.ones(sequence.marked)})], WEIGHTED)

    for length, marked in ((400, 4), (400, 200)):
        with _Largest() as largest:
            asyncio.run(score_and_train(_sequence(length, marked)))
        # The weights of the head and their gradient are [vocabulary, 8] themselves.
        assert largest.numel <= max(min(marked, 12), 8) * vocabulary
