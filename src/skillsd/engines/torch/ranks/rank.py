"""The embedded engine in one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from skillsd.engines.base import Loss, StepReport, Weights, not_finite
from skillsd.engines.torch import state
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.memory import explained, is_out_of_memory
from skillsd.engines.torch.micro_batches import free_memory
from skillsd.engines.torch.ranks import group
from skillsd.engines.torch.ranks.optimiser import SlicedAdamW
from skillsd.engines.torch.ranks.rounds import Finished, Round, RoundPlayer
from skillsd.metrics import Metrics
from skillsd.objective.logprobs import TokenLogprobs, Want

Passes = Sequence[tuple[Sequence[Any], Sequence[int], bool]]
"""A rank's micro-batches: the sequences or items of each, the prefix that each shares with the previous, and whether
the pass is a blank one, made only because other ranks need this rank's part of the weights in theirs."""


T = TypeVar("T")


@dataclass(frozen=True)
class TooLarge:
    """In place of a rank's results: a pass of this many tokens ran out of memory, but smaller ones may fit."""

    tokens: int


class NoLoss:
    """The loss of blank passes."""

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        return student.chosen.sum() * 0.0, {}


NO_LOSS = NoLoss()


class RankEngine(TorchEngine):
    """The embedded engine in one rank. It holds all weights, and a slice of the optimiser's state.

    Every rank makes the same calls in the same order. Scores and gradients are of the rank's own micro-batches.

    Args:
        seconds: the longest that ranks wait for each other.
        options: of `TorchEngine`.
    """

    _alone_in_a_pass = True
    """Whether a rank's passes need no other rank. If they do, one that fails leaves the others waiting in theirs."""

    def __init__(
        self, model: str, *, device: str, seconds: float, seed: int, threads: int | None, **options: Any
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(seed)  # new adapters have random initial weights, the same in all ranks
        self.mesh = group.join(device, seconds)
        self.rank = group.rank()
        own = device if device == "cpu" else f"{device}:{torch.cuda.current_device()}"
        super().__init__(model, device=own, **options)
        self._players = {weights: RoundPlayer(decoder) for weights, decoder in self.decoders.items()}

    def _prepare_training(self, **options: Any) -> None:
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimiser = SlicedAdamW(self.trainable.values(), self.mesh, **options)

    def play(self, news: Round, weights: Weights) -> Finished:
        """A step of sampling."""
        try:
            return self._players[weights].play(news)
        except FloatingPointError as error:
            raise not_finite(f"{weights}'s logits", self.version) from error

    def score(
        self, passes: Passes, weights: Weights, temperature: float, want: Want
    ) -> list[list[TokenLogprobs]] | TooLarge:
        """Log-probs, by micro-batch."""

        def score(part: Sequence[Any], shared: Sequence[int], blank: bool) -> list[TokenLogprobs]:
            return self._score_pass(part, shared, weights, temperature, want)

        with explained("scoring"):
            self._release()
            scored = self._each(passes, score)
        if isinstance(scored, TooLarge):
            return scored
        return [found for found, (_, _, blank) in zip(scored, passes, strict=True) if not blank]

    def learn(self, passes: Passes, loss: Loss, temperature: float) -> tuple[list[Metrics], bool] | TooLarge:
        """Add this rank's part of the gradient.

        Returns:
            The metrics by micro-batch, and whether all losses since the last step were finite.
        """

        def learn(part: Sequence[Any], shared: Sequence[int], blank: bool) -> Metrics:
            return self._train_pass(part, shared, NO_LOSS if blank else loss, temperature)

        with explained("computing gradients"):
            self._release()
            metrics = self._each(passes, learn)
            return metrics if isinstance(metrics, TooLarge) else (metrics, self._loss_is_finite)

    def _each(self, passes: Passes, compute: Callable[[Sequence[Any], Sequence[int], bool], T]) -> list[T] | TooLarge:
        """The results of all passes, unless one runs out of memory that smaller ones may not need."""
        results: list[T] = []
        for part, shared, blank in passes:
            try:
                results.append(compute(part, shared, blank))
                continue
            except (MemoryError, RuntimeError) as error:
                if not (is_out_of_memory(error) and len(part) > 1 and self._alone_in_a_pass):
                    raise
            free_memory()  # outside the except block, where the exception no longer refers to the activations
            sequences: list[Any] = [getattr(one, "sequence", one) for one in part]
            return TooLarge(sum(len(sequence.tokens) for sequence in sequences) - sum(shared))
        return results

    def forget_gradient(self) -> None:
        self.optimiser.zero_grad()

    def update(self, learning_rate: float, finite: bool, trained: bool) -> StepReport:
        """`step`.

        Args:
            finite: whether the losses of all ranks were.
            trained: whether any rank has a gradient.
        """
        with explained("updating the weights"):
            if trained:
                self._reduce()
            self._loss_is_finite = finite
            return self._step(learning_rate)

    def _reduce(self) -> None:
        """Sum the gradients of all ranks."""
        assert isinstance(self.optimiser, SlicedAdamW)
        self.optimiser.reduce()

    def prepare_export(self) -> None:
        """Have the whole weights in rank 0, which writes them or hands them to a sampler."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the sampler may run on the GPUs of all ranks

    def sync(self, rate: float) -> None:
        with explained("updating the weights"):
            self._sync_teacher(rate)

    def save(self, folder: Path) -> None:
        self.prepare_export()
        state.save(self, folder / state.FILE, write=self.rank == 0)
        if self.rank == 0:
            self.save_weights(folder / "model")
            self._written.check_once("checkpoint", folder / "model", self.version, adapter=self.lora)

    def restore(self, folder: Path) -> None:
        state.load(self, folder / state.FILE, checked=True)  # by rank 0
        self._loss_is_finite = True
        self.forget_caches()
