"""What the checks share: the engine under test, test data, and ways to look at an engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from skillsd.engines.base import (
    Engine,
    Learner,
    Sample,
    SampleRequest,
    StepReport,
    TokenSequence,
    TrainItem,
    Weights,
)
from skillsd.metrics import Mean, Metrics
from skillsd.objective.logprobs import WHOLE, TokenLogprobs


class Make(Protocol):
    """A factory of engines; every call gives the same weights."""

    def __call__(self, *, snapshot_teacher: bool = False, micro_batch_tokens: int = 8192) -> Engine:
        """A new engine.

        Args:
            snapshot_teacher: the teacher has weights of its own; otherwise it follows the student.
        """
        ...


@dataclass(frozen=True)
class Subject:
    """An engine under test.

    Attributes:
        make: the factory.
        reference: token ids -> log-probs ``[tokens, vocab]`` of a new engine's weights, computed plainly; row i
            predicts token i + 1. None skips the comparison.
        tolerance: of a log-prob, between two ways to compute it.
        relative: of a gradient's norm, between two ways to sum it.
        batch_invariant: rounding is small enough that the same tokens are sampled whatever shares the batch.
        tokens: the ids to make sequences of: ordinary tokens, not control tokens.
    """

    make: Make
    reference: Callable[[Sequence[int]], Tensor] | None = None
    tolerance: float = 1e-5
    relative: float = 1e-4
    batch_invariant: bool = True
    tokens: range = range(30, 256)

    def ids(self, count: int, seed: int) -> tuple[int, ...]:
        """Random token ids."""
        return tuple(random.Random(seed).choices(self.tokens, k=count))

    def sequences(self, lengths: Sequence[int] = (12, 3, 30, 7, 30, 19)) -> list[TokenSequence]:
        """Ragged, each marked in several stretches, the first and the last possible place among them."""
        made = []
        for number, length in enumerate(lengths):
            mask = [False, True] + [(place // 3 + number) % 2 == 0 for place in range(2, length - 1)] + [True]
            made.append(TokenSequence(self.ids(length, number), tuple(mask[:length])))
        return made

    def batch(self, sequences: Sequence[TokenSequence] | None = None, scale: float = 1.0) -> list[TrainItem]:
        """Weights of both signs, like advantages, normalised by the number of tokens in the batch."""
        chosen = self.sequences() if sequences is None else sequences
        total = sum(s.marked for s in chosen)
        generator = torch.Generator().manual_seed(7)
        return [
            TrainItem(s, {"weight": (torch.rand(s.marked, generator=generator) * 2 - 0.5) * scale / total})
            for s in chosen
        ]

    async def train(
        self, engine: Engine, steps: int = 1, learning_rate: float = 1e-2, scale: float = 1.0
    ) -> list[StepReport]:
        """A few steps on `batch`, published to the sampler."""
        reports = []
        for _ in range(steps):
            await engine.learner.forward_backward(self.batch(scale=scale), WEIGHTED)
            reports.append(await engine.learner.step(learning_rate))
        await engine.publish()
        return reports

    async def view(self, engine: Engine, weights: Weights = "student") -> Tensor:
        """What can be seen of the weights: the log-probs at every marked place, ``[marked]`` or ``[marked, vocab]``."""
        if engine.capabilities.distribution:
            found = await engine.learner.logprobs(self.sequences(), weights, want=WHOLE)
            return torch.cat([distribution_of(logprobs) for logprobs in found])
        return torch.cat([one.chosen for one in await engine.learner.logprobs(self.sequences(), weights)])

    def close_views(self, a: Tensor, b: Tensor, what: str) -> None:
        expect(gap(a, b) <= self.tolerance, f"{what}: log-probs differ by up to {gap(a, b):.3g}")


@dataclass(frozen=True)
class WeightedLoss:
    """Policy gradient with given weights, the simplest loss that has a direction."""

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        loss = -(signals["weight"] * student.chosen).sum()
        return loss, {"loss": Mean(loss.item(), len(student.chosen))}


WEIGHTED = WeightedLoss()


class SkippedCheck(Exception):  # noqa: N818 (not an error)
    """The engine lacks the capability that a check is about."""


def require(engine: Engine, *capabilities: str) -> None:
    """Skip the check if the engine lacks one of the capabilities."""
    for capability in capabilities:
        if not getattr(engine.capabilities, capability):
            engine.close()
            raise SkippedCheck(f"the engine lacks the capability {capability!r}")


def expect(holds: bool, promise: str) -> None:
    """Raise AssertionError with the promise that was broken."""
    if not holds:
        raise AssertionError(promise)


def equal(found: Any, expected: Any, what: str) -> None:
    """Equality, of tensors too."""
    same = torch.equal(found, expected) if isinstance(found, Tensor) else found == expected
    expect(bool(same), f"{what}: expected {_short(expected)}, found {_short(found)}")


def near(found: float, expected: float, relative: float, what: str, absolute: float = 0.0) -> None:
    """Equality to a relative (or absolute) tolerance."""
    room = max(relative * abs(expected), absolute)
    expect(abs(found - expected) <= room, f"{what}: expected {expected:.9g}, found {found:.9g}")


async def refuses(call: Awaitable[Any], error: type[Exception], words: str, what: str) -> None:
    """The call raises `error`, with `words` in its message."""
    try:
        await call
    except error as raised:
        expect(words in str(raised), f"{what}: the error should mention {words!r}; it says {str(raised)!r}")
    else:
        raise AssertionError(f"{what}: expected {error.__name__}, but nothing was raised")


def gap(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return (a - b).abs().max().item()


def distribution_of(logprobs: TokenLogprobs) -> Tensor:
    if logprobs.distribution is None:
        raise AssertionError("log-probs of more than the chosen token were wanted, and not given")
    return logprobs.distribution


def norm_of(report: StepReport) -> float:
    """The gradient's norm; engines without one skip what is compared by it."""
    if report.grad_norm is None:
        raise SkippedCheck("the engine does not report the gradient's norm")
    return report.grad_norm


async def sample_all(engine: Engine, requests: Sequence[SampleRequest]) -> list[Sample]:
    """All requests at once."""
    return list(await asyncio.gather(*(engine.sampler_of(r.weights).sample(r) for r in requests)))


async def chosen(learner: Learner, sequences: Sequence[TokenSequence], **options: Any) -> list[Tensor]:
    """The chosen tokens' log-probs."""
    return [one.chosen for one in await learner.logprobs(sequences, **options)]


def loss_of(metrics: Metrics) -> Mean:
    found = metrics["loss"]
    if not isinstance(found, Mean):
        raise AssertionError(f"the loss's metric came back as {type(found).__name__}, expected a Mean")
    return found


def _short(value: Any) -> str:
    text = f"tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
