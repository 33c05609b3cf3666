"""Forward passes over packed tokens, of a model under one set of weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from skillsd.engines.base import Loss, TokenSequence, TrainItem, wanted_by
from skillsd.engines.top_k import coarse_grain, select
from skillsd.engines.torch.attention import PackedPlan, Plan
from skillsd.engines.torch.chosen import chosen_logprobs
from skillsd.engines.torch.lm_head import TrunkAndHead, in_chunks, most_logits
from skillsd.errors import UserError
from skillsd.metrics import Metrics
from skillsd.objective.logprobs import CHOSEN, TokenLogprobs, Want


@dataclass(frozen=True)
class Network:
    """A model under the student's or the teacher's weights.

    Attributes:
        run: calls the model with these weights.
        split: separates its trunk from its output head.
        vocabulary: number of logits that stand for tokens; any after that are dropped.
    """

    run: Callable[..., Any]
    split: TrunkAndHead
    vocabulary: int
    device: torch.device

    def forward(
        self,
        sequences: Sequence[TokenSequence],
        shared: Sequence[int],
        temperature: float,
        want: Want = CHOSEN,
        candidates: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One forward pass over whole sequences.

        Args:
            shared: for each sequence, the number of its first tokens that it shares with the one before it.
            candidates: for ``top_k``, ids ``[marked, k]``. If None, the most likely tokens.

        Returns:
            As wanted, with one row per marked place: log-probs of the marked tokens; log-probs of all tokens, or of the
            candidates and of all others together; the candidates, unless they were given.
        """
        plan = PackedPlan([len(s.tokens) for s in sequences], self.device, shared)
        ids = torch.tensor([t for s, taken in zip(sequences, shared, strict=True) for t in s.tokens[taken:]])
        # The token at place i is predicted from place i - 1: the head runs there and nowhere else.
        marked = [torch.tensor(s.mask).nonzero().squeeze(1) for s in sequences]
        places = torch.cat([source[at - 1] for source, at in zip(plan.source, marked, strict=True)])
        targets = torch.tensor(
            [t for s in sequences for t, is_marked in zip(s.tokens, s.mask, strict=True) if is_marked]
        )
        inputs = {"input_ids": ids.to(self.device).unsqueeze(0), "position_ids": plan.positions}
        hidden = self.split.hidden(self.run, **inputs, use_cache=False, plan=plan)
        hidden = hidden.index_select(0, places.to(self.device))

        def compute(hidden: Tensor, targets: Tensor, candidates: Tensor | None = None) -> tuple[Tensor, ...]:
            logits = self.split.logits(self.run, hidden)
            if want.kind == "chosen":
                return (chosen_logprobs(logits, targets, self.vocabulary, temperature),)
            logits = logits[:, : self.vocabulary].float()
            if temperature != 1:
                logits = logits / temperature
            return _read(torch.log_softmax(logits, dim=-1), targets, want, candidates)

        size = max(1, most_logits(hidden.is_cuda, want.kind == "chosen") // self.vocabulary)
        more = [] if candidates is None else [candidates]
        return in_chunks(hidden, targets.to(self.device), size, compute, *more)

    def backward(
        self, items: Sequence[TrainItem], shared: Sequence[int], temperature: float, loss: Loss
    ) -> tuple[float, Metrics]:
        """A forward pass over whole sequences, and the backward pass of a loss; returns its value and metrics."""
        want = wanted_by(loss)
        names = items[0].signals.keys()
        signals = {name: torch.cat([item.signals[name] for item in items]).to(self.device) for name in names}
        candidates = signals["candidates"] if want.kind == "top_k" else None
        given = {} if candidates is None else {"candidates": candidates}
        found = self.forward([item.sequence for item in items], shared, temperature, want, candidates)
        value, metrics = loss(TokenLogprobs(*found, **given), signals)
        value.backward()
        return value.item(), metrics

    def decode(self, ids: Tensor, plan: Plan, places: Tensor | None) -> Tensor:
        """One forward pass over new tokens, packed ``[tokens]``; logits ``[places, vocab]`` at the given places.

        Args:
            places: None for all tokens.
        """
        kept = 0 if places is None else places  # to transformers, 0 means all
        inputs = {"input_ids": ids.unsqueeze(0), "position_ids": plan.positions, "logits_to_keep": kept}
        logits: Tensor = self.run(**inputs, use_cache=False, plan=plan).logits[0, :, : self.vocabulary]
        return logits


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> Callable[..., Any]:
    """Calls `model` with these weights in place of its parameters of the same names."""
    return lambda **inputs: torch.func.functional_call(model, weights, (), inputs)


def enable_recomputation(model: nn.Module) -> None:
    """Prepare `recomputed_activations`.

    Raises:
        UserError: if no layer of the model supports it.
    """
    with warnings.catch_warnings(), suppress(ValueError):  # the error: no layer supports it
        warnings.simplefilter("ignore", FutureWarning)  # its name from transformers 5.24 on is another
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    layers = _recomputed_layers(model)
    if not layers:
        raise UserError(
            f"model.gradient_checkpointing is true, but {type(model).__name__} can't do that: set it to false"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = partial(_recompute, layer)  # type: ignore[assignment]


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[None]:
    """Have the layers recompute their activations in the backward pass, without the dropout of training mode."""
    layers = _recomputed_layers(model)
    for layer in layers:
        layer.training = True  # what `transformers` asks of a layer whose activations are to be recomputed
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _recomputed_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]


def _recompute(layer: nn.Module, call: Callable[..., Any], *args: Any) -> Any:
    def run(*args: Any) -> Any:
        layer.training = False  # some layers (BioGPT's) apply dropout by this flag
        try:
            return call(*args)
        finally:
            layer.training = True

    return checkpoint(run, *args, use_reentrant=False)


def _read(full: Tensor, ids: Tensor, want: Want, candidates: Tensor | None) -> tuple[Tensor, ...]:
    """What is wanted of the log-probs ``[tokens, vocab]``."""
    if candidates is not None:
        return full.gather(1, ids.unsqueeze(1)).squeeze(1), coarse_grain(full, candidates)
    found = select(full, ids, want)
    return tuple(x for x in (found.chosen, found.distribution, found.candidates) if x is not None)
