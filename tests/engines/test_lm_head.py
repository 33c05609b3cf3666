"""Logits in chunks: the same numbers and gradients, and never many of them at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines import tiny
from engines.conformance import _batch, _sequences, _weighted
from skillsd.engines.base import TokenSequence, TrainItem
from skillsd.engines.torch import halves
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.models import LoraOptions
from skillsd.metrics import Mean
from skillsd.objective import TokenLogprobs

Folder = Callable[[str], Path]

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Llama", {**tiny.GROUPED, "tie_word_embeddings": True}),
    "scaled": ("Granite", {**tiny.GROUPED, "logits_scaling": 3.0}),
    "multiplied": ("Cohere", {**tiny.GROUPED, "logit_scale": 0.25}),
    "soft-capped": ("Gemma3Text", {**tiny.GROUPED, "sliding_window": 9, "final_logit_softcapping": 2.0}),
    "mixture": tiny.ARCHITECTURES["qwen3-moe"],
}


def _entropic(logprobs: TokenLogprobs, signals: Any) -> tuple[Tensor, dict[str, Mean]]:
    """A loss of the whole distribution, or of candidates and the rest."""
    full = logprobs.distribution
    assert full is not None
    return (full.exp() * full).sum() + (signals["weight"] * logprobs.chosen).sum(), {}


def _everything(engine: TorchEngine) -> list[Tensor]:
    """All that the engine says of the marked tokens, and the gradients of three losses."""
    sequences = _sequences()
    tops = engine.score_top_k(sequences, 5, temperature=0.7)
    found = [*engine.score(sequences), *engine.score(sequences, temperature=0.7, distribution=True)]
    found += [tensor for top in tops for tensor in (top.chosen, top.logprobs)]
    batch = _batch()
    coarse = [
        TrainItem(item.sequence, {**item.signals, "candidates": top.ids}) for item, top in zip(batch, tops, strict=True)
    ]
    for items, loss, distribution in ((batch, _weighted, False), (batch, _entropic, True), (coarse, _entropic, True)):
        engine.forward_backward(items, loss, temperature=0.7, distribution=distribution)
        found += [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]
        engine._optimiser.zero_grad()
    return found


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=4)])
@pytest.mark.parametrize("head", HEADS)
def test_chunks_change_nothing(
    head: str, lora: LoraOptions | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write(tmp_path, *HEADS[head])
    engine = TorchEngine(str(folder), device="cpu", lora=lora)
    plain = tiny.Plain(folder)
    for sequence, score in zip(_sequences(), engine.score(_sequences()), strict=True):
        places = torch.tensor(sequence.mask).nonzero().squeeze(1)
        expected = plain.logprobs(sequence.tokens)[places - 1, torch.tensor(sequence.tokens)[places]]
        assert torch.allclose(score, expected, rtol=0, atol=1e-5)
    whole = _everything(engine)
    monkeypatch.setattr(halves, "LOGITS", 7 * engine._vocabulary)  # seven tokens at a time
    chunked = _everything(engine)
    assert len(whole) == len(chunked)
    for one, other in zip(whole, chunked, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=2e-5)


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor held which was computed meanwhile, backward passes included."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


def _sequence(length: int, marked: int) -> TokenSequence:
    return TokenSequence(tuple(range(30, 30 + length)), (*[False] * (length - marked), *[True] * marked))


def test_no_tensor_holds_the_logits_of_a_whole_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large vocabulary: sequence length plays no part, and of sampled tokens only a chunk's logits exist."""
    vocabulary = 20_000
    options = {**tiny.GROUPED, "vocab_size": vocabulary, "tie_word_embeddings": True, "hidden_size": 8}
    engine = TorchEngine(str(tiny.write(tmp_path, "Llama", options)), device="cpu")
    monkeypatch.setattr(halves, "LOGITS", 12 * vocabulary)
    for length, marked in ((400, 4), (400, 200)):
        sequence = _sequence(length, marked)
        with _Largest() as largest:
            engine.score([sequence])
            engine.score_top_k([sequence], 8)
            engine.forward_backward([TrainItem(sequence, {"weight": torch.ones(marked)})], _weighted)
        # The weights of the head and their gradient are [vocabulary, 8] themselves.
        assert largest.numel <= max(min(marked, 12), 8) * vocabulary
