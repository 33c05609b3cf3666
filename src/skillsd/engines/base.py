"""What a training loop asks of a model, wherever the model lives: a `Learner` that scores and trains, a `Sampler` that
decodes, and an `Engine`, a pair of them.

One object may play both roles, as the embedded engine does. The methods are async so that a remote engine can be
awaited; a local engine that never yields is a plain call, and keeps its determinism. `skillsd.engines.conformance`
checks that an implementation keeps the promises written here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from skillsd.engines.spec import Capabilities
from skillsd.errors import EngineFailedError, UserError
from skillsd.metrics import Metrics
from skillsd.objective.logprobs import CHOSEN, TokenLogprobs, Want

Weights = Literal["student", "teacher"]


@dataclass(frozen=True)
class SampleRequest:
    """Continue `tokens`, the whole sequence so far, until a stop token or `max_tokens`.

    Attributes:
        max_tokens: at least 1.
        seed: with the weights and the tokens it determines what is sampled; other requests that are decoded at the same
            time have no influence (but for rounding, which in bfloat16 can tip a close choice).
        temperature: of the sampling distribution; 0 takes the most likely token.
        session: name of the episode. A sampler may keep its KV cache between the requests of one session; each
            request's tokens must then extend the last one's tokens and sample. Student and teacher have separate
            sessions.
        weights: whose weights sample.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    session: str | None = None
    weights: Weights = "student"


@dataclass(frozen=True)
class Sample:
    """A sampled continuation.

    Attributes:
        tokens: the sampled ids, the stop token included.
        logprobs: of each token under the *sampling* distribution.
        version: of the student's weights that were loaded when it was sampled.

    Raises:
        EngineFailedError: if a log-prob is not finite.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: Literal["stop", "length"]
    version: int = 0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.logprobs)):
            raise not_finite("sampled log-probs", self.version)


def not_finite(what: str, version: int) -> EngineFailedError:
    """The error for nan or infinity in what a model computes.

    Args:
        version: of the student's weights.
    """
    return EngineFailedError(
        f"the {what} are not finite (nan or infinity), with the weights after update {version}: training has diverged, "
        "or the weights are damaged. Start again from an earlier checkpoint (model.name=RUN/checkpoints/step-N/model) "
        "with a lower training.learning_rate"
    )


def check_request(request: SampleRequest, max_length: int, held: Sequence[int] = ()) -> None:
    """Refuse what `Sampler.sample` promises to refuse.

    Args:
        held: the tokens of the request's session so far.

    Raises:
        ValueError: with what is wrong.
    """
    if not request.tokens or request.max_tokens < 1:
        raise ValueError(
            f"the request has {len(request.tokens)} tokens and max_tokens {request.max_tokens}: expected at least one "
            "token each"
        )
    needed = len(request.tokens) + request.max_tokens
    if needed > max_length:
        raise ValueError(
            f"the request needs {needed} tokens (its own and max_tokens), but the model takes at most {max_length}"
        )
    if request.tokens[: len(held)] != tuple(held):
        raise ValueError(
            f"session {request.session!r}: the request's tokens do not extend what the session holds ({len(held)} "
            "tokens); a trajectory's prefix must never change"
        )


@dataclass(frozen=True)
class TokenSequence:
    """Token ids, with marks on those whose log-probs are wanted. The first token has no history and can't be marked."""

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.mask):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.mask)} marks")
        if self.mask and self.mask[0]:
            raise ValueError("the first token can't be marked: nothing comes before it to predict it from")

    @property
    def marked(self) -> int:
        """Number of marked tokens."""
        return sum(self.mask)


@dataclass(frozen=True)
class TrainItem:
    """One sequence of a training batch.

    Attributes:
        sequence: marked where the loss applies.
        signals: the loss's inputs other than the student's log-probs, a tensor ``[marked]`` or ``[marked, ...]`` each,
            of the same names in every item of a batch. The engine itself reads one of them, ``candidates``: see
            `Learner.forward_backward`.
    """

    sequence: TokenSequence
    signals: Mapping[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """A loss that can run where the model is: pure, and picklable for learners in other processes.

    `skillsd.objective.Loss` is one. A plain function works with learners in this process; without an attribute ``want``
    it gets the chosen tokens' log-probs.
    """

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor], /) -> tuple[Tensor, Metrics]:
        """Log-probs of a micro-batch's marked tokens and their signals -> (summed loss, metrics)."""
        ...


def wanted_by(loss: Loss) -> Want:
    """Which log-probs of the student a loss needs: its attribute ``want``, or those of the chosen tokens alone."""
    want: Want = getattr(loss, "want", CHOSEN)
    return want


@dataclass(frozen=True)
class StepReport:
    """What an optimiser step did.

    Attributes:
        applied: False if a loss or gradient was not finite, so that nothing was updated.
        grad_norm: before clipping; None where the engine does not report it.
        version: of the student's weights from now on.
    """

    applied: bool
    grad_norm: float | None
    version: int = 0


@dataclass(frozen=True)
class WeightsHandle:
    """A published version of the student's weights, on its way from a learner to a sampler.

    Attributes:
        version: counts the learner's updates.
        location: a folder in the format of ``transformers`` (adapters merged, an output head of its own), or a remote
            path; None if the sampler shares the learner's memory.
    """

    version: int
    location: str | None = None


class StaleTeacherError(RuntimeError):
    """The teacher follows the student without a copy of its own, and the student has moved since the last sync."""


class Learner(ABC):
    """Scores and trains: the student's weights, the teacher's, and the optimiser."""

    tokenizer: Any
    """The tokenizer of ``transformers`` that belongs to the weights, with its chat template."""

    stop_tokens: frozenset[int]
    """Ids that end a turn."""

    max_length: int
    """The most tokens a sequence may have."""

    version: int
    """Of the student's weights: the number of updates so far."""

    @property
    def published_bytes(self) -> int:
        """The most bytes that `publish` writes into a folder; 0 if unknown."""
        return 0

    @abstractmethod
    async def logprobs(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
        want: Want = CHOSEN,
    ) -> list[TokenLogprobs]:
        """Log-probs at the marked places, in float32, on the CPU, without gradient; one per sequence.

        ``chosen`` is ``[marked]``; ``distribution`` is ``[marked, vocab]`` if the whole vocabulary is wanted, or
        ``[marked, k + 1]`` with ``candidates`` ``[marked, k]``, the k most likely tokens, most likely first.

        Raises:
            ValueError: if a sequence is longer than `max_length`, or k is not at least 1 and less than the vocabulary.
            StaleTeacherError: for a teacher without a copy of its own, if the student moved since the last sync.
        """

    @abstractmethod
    async def forward_backward(self, batch: Sequence[TrainItem], loss: Loss, *, temperature: float = 1.0) -> Metrics:
        """Accumulate the gradient of `loss`, summed over micro-batches; returns its metrics, merged.

        The caller normalises by counts over the whole minibatch, so the gradient does not depend on how it is cut. The
        loss gets the log-probs it wants (`wanted_by`). If it wants ``top_k``, the candidates are the signal
        ``candidates`` (int64 ids ``[marked, k]``, distinct in each row), such as a teacher's; the loss gets that signal
        like any other.

        Raises:
            ValueError: if a sequence is longer than `max_length`, or `candidates` have another shape, type or range.
        """

    @abstractmethod
    async def step(self, learning_rate: float) -> StepReport:
        """Clip the gradient, update the student, and forget the gradient.

        If the gradient, or a loss it came from, is not finite, nothing is updated (`StepReport.applied` is False) and
        the gradient is forgotten.
        """

    @abstractmethod
    async def sync_teacher(self, rate: float = 1.0) -> None:
        """Set the teacher's weights to ``(1 - rate) * teacher + rate * student``, with the student's current weights.

        With 1 the teacher is the student; smaller rates, call by call, make it an exponential moving average. A teacher
        that is another model stays as it is.

        Raises:
            ValueError: if `rate` is not in (0, 1], or is below 1 where the teacher keeps no weights of its own.
        """

    @abstractmethod
    async def publish(self, folder: Path | None = None) -> WeightsHandle:
        """Make the student's current weights available to a sampler.

        Args:
            folder: write them there, as `WeightsHandle.location` describes; None hands them over in memory, or as the
                learner's own remote path.
        """

    @abstractmethod
    async def save_state(self, folder: Path) -> None:
        """Write everything that training needs to go on into an existing folder: weights (in ``model/``, in the format
        of ``transformers``), optimiser, teacher, random state, version."""

    @abstractmethod
    async def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote. With the capability ``exact_resume`` training goes on bit for bit.

        Raises:
            UserError: if the folder holds no such state, it is damaged, or it is of another model or teacher.
        """

    async def export(self, folder: Path, *, merge: bool = False) -> None:
        """Write the student as a model folder that ``transformers`` loads; under LoRA the adapter, unless merged.

        Args:
            merge: add the adapter to the base model's weights.

        Raises:
            UserError: if the engine can't, or there is no adapter to merge.
        """
        raise UserError(f"{type(self).__name__} does not export its weights")

    def close(self) -> None:  # noqa: B027 (most engines have nothing to end)
        """No more calls will come: end what runs outside of this process. Closing twice is harmless."""


class Sampler(ABC):
    """Decodes many episodes at once with published weights."""

    max_length: int
    """The most tokens a sequence may have, its continuation included."""

    inbox: Path | None = None
    """Folder that weights must be published into; None if they are handed over in memory or by a remote path."""

    samples_teacher: bool = False
    """Whether requests with the teacher's weights can be answered."""

    @abstractmethod
    async def sample(self, request: SampleRequest) -> Sample:
        """Sample a continuation. Many requests may be under way at once, one per session.

        Raises:
            ValueError: if it is longer than `max_length`, empty, asks for no tokens, or does not extend its session.
            RuntimeError: if decoding failed or the session was ended meanwhile.
        """

    @abstractmethod
    def end_session(self, session: str) -> None:
        """The episode is over: free what was kept for it. Unknown sessions are ignored."""

    @abstractmethod
    async def load(self, weights: WeightsHandle) -> None:
        """Sample from these weights from now on. No KV cache of earlier weights outlives this call."""

    async def sleep(self) -> None:  # noqa: B027 (most samplers have nothing to free)
        """Free memory for the learner, where that helps. Later requests wait for the next `load`."""

    async def verified(self) -> None:  # noqa: B027
        """Wait for a check of the weights loaded last that needs the learner and the first samples, if there is one."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the requests since the last call."""
        return {}

    def close(self) -> None:  # noqa: B027
        """No more calls will come: end what runs outside of this process. Closing twice is harmless."""


@dataclass(frozen=True)
class Engine:
    """A learner and the sampler of its rollouts; both may be one object.

    Attributes:
        name: as recipes call it.
        capabilities: what the pair can do.
    """

    learner: Learner
    sampler: Sampler
    name: str
    capabilities: Capabilities

    @property
    def tokenizer(self) -> Any:
        return self.learner.tokenizer

    @property
    def stop_tokens(self) -> frozenset[int]:
        return self.learner.stop_tokens

    @property
    def max_length(self) -> int:
        """The most tokens of a sequence that is scored or trained on."""
        return self.learner.max_length

    def sampler_of(self, weights: Weights) -> Sampler:
        """The sampler of these weights: the engine's, or the learner itself if only that can sample from the teacher.

        Raises:
            UserError: if neither can sample from the teacher.
        """
        if weights == "student" or self.sampler.samples_teacher:
            return self.sampler
        if isinstance(self.learner, Sampler) and self.learner.samples_teacher:
            return self.learner
        raise UserError(f"engine {self.name!r} can't sample from the teacher's weights")

    async def publish(self) -> None:
        """Hand the student's current weights to the sampler."""
        await self.sampler.load(await self.learner.publish(self.sampler.inbox))

    async def load_state(self, folder: Path) -> None:
        """Restore a checkpoint, the sampler's weights included."""
        await self.learner.load_state(folder)
        await self.publish()

    def close(self) -> None:
        self.sampler.close()
        if self.learner is not self.sampler:
            self.learner.close()
