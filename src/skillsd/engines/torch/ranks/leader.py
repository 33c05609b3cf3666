"""The embedded engine of all ranks, for the training loop in rank 0."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from torch import Tensor

from skillsd.engines.base import (
    Learner,
    Loss,
    Sample,
    Sampler,
    SampleRequest,
    StepReport,
    TokenSequence,
    TrainItem,
    Weights,
    WeightsHandle,
    wanted_by,
)
from skillsd.engines.top_k import check_candidates, nothing
from skillsd.engines.torch import state
from skillsd.engines.torch.ranks.dealing import Part, hands
from skillsd.engines.torch.ranks.layers import LayerEngine
from skillsd.engines.torch.ranks.orders import Ranks
from skillsd.engines.torch.ranks.rank import Passes, RankEngine, TooLarge
from skillsd.engines.torch.ranks.rounds import Finished, Round, RoundDecoder
from skillsd.metrics import Metrics, add_metrics
from skillsd.objective.logprobs import CHOSEN, TokenLogprobs, Want

T = TypeVar("T")


def ready() -> None:
    """Has imported this module, and with it torch and `transformers`."""


def rank_engine(shard: str, model: str, **options: Any) -> RankEngine:
    """The engine of one rank.

    Args:
        shard: ``state`` or ``layers``.
    """
    if shard == "state":
        return RankEngine(model, **options)
    return LayerEngine(model, **options)


class Leader(Learner, Sampler):
    """A learner and sampler whose calls go to all ranks.

    What can be refused is refused here, before the ranks are given an order: an order that fails in a rank ends the
    run, since the ranks no longer agree.

    Args:
        options: of `RankEngine`.
    """

    samples_teacher = True

    def __init__(
        self, ranks: Ranks, shard: str, model: str, *, in_thread: bool, max_sessions: int, **options: Any
    ) -> None:
        most = -(-max_sessions // ranks.size)
        self._layers = shard == "layers"
        ranks.make(ready)  # ranks that import at different speeds would spend the time that they have to connect
        self._all = ranks.make(rank_engine, shard, model, seconds=ranks.seconds, max_sessions=most, **options)
        self.own: RankEngine = self._all.own
        self._in_thread = in_thread
        self.tokenizer, self.stop_tokens, self.max_length = (
            self.own.tokenizer,
            self.own.stop_tokens,
            self.own.max_length,
        )
        self.device = self.own.device
        self.decoders = {
            weights: RoundDecoder(ranks.size, partial(self._play, weights)) for weights in get_args(Weights)
        }
        self._since_step: list[Callable[[], list[Any]]] = []  # each adds its part of the gradient
        self._finite = True  # all losses since the last step

    @property
    def version(self) -> int:  # type: ignore[override]
        return self.own.version

    async def _compute(self, work: Callable[[], T]) -> T:
        for decoder in self.decoders.values():
            decoder.release()
        return await asyncio.to_thread(work) if self._in_thread else work()

    # -- sampling -----------------------------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Sample:
        return await self.own.sample_by(self.decoders, request)

    def end_session(self, session: str) -> None:
        for decoder in self.decoders.values():
            decoder.end_session(session)

    async def load(self, weights: WeightsHandle) -> None:
        await self.own.load(weights)

    def _play(self, weights: Weights, news: Sequence[Round]) -> Sequence[Finished]:
        return self._all.call("play", weights, each=news)

    # -- scoring and training -----------------------------------------------------------------------------------

    async def logprobs(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
        want: Want = CHOSEN,
    ) -> list[TokenLogprobs]:
        self.own.check_scoring(sequences, weights, want)
        scored: dict[int, TokenLogprobs] = {}

        def score() -> list[Any]:
            dealt = self._dealt(sequences)
            each = self._passes(dealt, sequences, sequences)
            answers = self._all.call("score", weights, temperature, want, each=each)
            if not _too_large(answers):
                for hand, answer in zip(dealt, answers, strict=True):
                    for (part, _), found in zip(hand, answer, strict=True):
                        scored.update(zip(part, found, strict=True))
            return answers

        if any(sequence.marked for sequence in sequences):
            await self._compute(lambda: self._until_they_fit(score, score))
        return [scored[i] if i in scored else nothing(want, self.own.vocabulary) for i in range(len(sequences))]

    async def forward_backward(self, batch: Sequence[TrainItem], loss: Loss, *, temperature: float = 1.0) -> Metrics:
        sequences = [item.sequence for item in batch]
        self.own.check_lengths(sequences)
        if wanted_by(loss).kind == "top_k":
            check_candidates(batch, self.own.vocabulary)
        if not any(sequence.marked for sequence in sequences):
            return {}

        def learn() -> list[Any]:
            each = self._passes(self._dealt(sequences), sequences, batch)
            return self._all.call("learn", loss, temperature, each=each)

        def again() -> list[Any]:
            self._all.call("forget_gradient")  # passes that fitted have added theirs
            for earlier in self._since_step:
                if _too_large(answers := earlier()):
                    return answers
            return learn()

        answers = await self._compute(lambda: self._until_they_fit(learn, again))
        self._since_step.append(learn)
        self._finite = all(finite for _, finite in answers)
        return add_metrics(one for metrics, _ in answers for one in metrics)

    def _until_they_fit(self, order: Callable[[], list[Any]], again: Callable[[], list[Any]]) -> list[Any]:
        """The answers to an order; `again` with smaller micro-batches in all ranks, if one ran out of memory."""
        answers = order()
        while too_large := _too_large(answers):
            self.own.micro_batches.lower(min(too_large))
            answers = again()
        return answers

    def _dealt(self, sequences: Sequence[TokenSequence]) -> list[list[Part]]:
        return hands(sequences, self.own.micro_batches.budget, self._all.ranks.size)

    def _passes(
        self, dealt: Sequence[Sequence[Part]], sequences: Sequence[TokenSequence], things: Sequence[Any]
    ) -> list[Passes]:
        """Each rank's passes over its micro-batches of `things`; as many for each, if weights are gathered in them."""
        each: list[Passes] = [[([things[i] for i in part], shared, False) for part, shared in h] for h in dealt]
        if self._layers:
            marked = [i for i, sequence in enumerate(sequences) if sequence.marked]
            shortest = min(marked, key=lambda i: len(sequences[i].tokens))
            most = max(map(len, each))
            each = [[*passes, *[([things[shortest]], [0], True)] * (most - len(passes))] for passes in each]
        return each

    async def step(self, learning_rate: float) -> StepReport:
        for decoder in self.decoders.values():
            decoder.clear()
        finite, trained = self._finite, bool(self._since_step)
        reports = await self._compute(lambda: self._all.call("update", learning_rate, finite, trained))
        self._since_step, self._finite = [], True
        report: StepReport = reports[0]
        return report

    async def sync_teacher(self, rate: float = 1.0) -> None:
        self.own.check_sync(rate)
        self._all.call("sync", rate)

    # -- weights out and in -------------------------------------------------------------------------------------

    async def publish(self, folder: Path | None = None) -> WeightsHandle:
        if folder is not None:
            self._all.call("prepare_export")
        return await self.own.publish(folder)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        self._all.call("prepare_export")
        return self.own.weights()

    @property
    def published_bytes(self) -> int:
        return self.own.published_bytes

    async def export(self, folder: Path, *, merge: bool = False) -> None:
        self._all.call("prepare_export")
        await self.own.export(folder, merge=merge)

    async def save_state(self, folder: Path) -> None:
        self._all.call("save", folder)

    async def load_state(self, folder: Path) -> None:
        state.check(self.own, folder / state.FILE)
        self._all.call("restore", folder)
        self._since_step, self._finite = [], True


def _too_large(answers: Sequence[Any]) -> list[int]:
    """The tokens of the passes that ran out of memory."""
    return [answer.tokens for answer in answers if isinstance(answer, TooLarge)]
