"""The engine: six calls that a training loop needs of a model, wherever the model lives.

`sample`, `score`, `forward_backward`, `step`, `sync_teacher`, `save`/`load`. One conformance suite
(`tests/engines/conformance.py`) runs against every engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from skillsd.metrics import Mean
    from skillsd.objective import TokenLogprobs

Weights = Literal["student", "teacher"]


@dataclass(frozen=True)
class SampleRequest:
    """Continue `tokens`, the whole sequence so far, until a stop token or `max_tokens`.

    Attributes:
        max_tokens: at least 1.
        seed: determines what is sampled, together with the weights and the tokens; nothing else that is being
            decoded at the same time plays a part (but for rounding, which in bfloat16 can tip a close choice).
        temperature: of the sampling distribution; 0 takes the most likely token.
        session: name of the episode. An engine may keep its KV cache between the requests of one session;
            each request's tokens must then extend the last one's tokens and sample.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    session: str | None = None
    weights: Weights = "student"


@dataclass(frozen=True)
class Sample:
    """The sampled ids, the stop token included, with the log-prob of each under the *sampling* distribution."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class TokenSequence:
    """Ids with the tokens marked whose log-probs are wanted. The first token has no history and can't be marked."""

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.mask):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.mask)} marks")
        if self.mask and self.mask[0]:
            raise ValueError("the first token can't be marked: nothing comes before it to predict it from")

    @property
    def marked(self) -> int:
        return sum(self.mask)


@dataclass(frozen=True)
class TrainItem:
    """One sequence of a training batch.

    Attributes:
        sequence: marked where the loss applies.
        signals: what the loss needs beside the student's log-probs, a tensor ``[marked]`` or ``[marked, ...]`` each,
            of the same names in every item of a batch. The engine itself reads one name, ``candidates``: see
            `Engine.forward_backward`.
    """

    sequence: TokenSequence
    signals: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TopK:
    """The most likely tokens at each marked place of a sequence, and how much mass is left for all others.

    Attributes:
        chosen: log-probs of the marked tokens themselves, as `Engine.score` gives them, ``[marked]``.
        ids: the k most likely tokens, the most likely first, int64 ``[marked, k]``.
        logprobs: theirs and, last, the log of the mass of all other tokens together, ``[marked, k + 1]``.
    """

    chosen: Tensor
    ids: Tensor
    logprobs: Tensor


LossFunction = Callable[["TokenLogprobs", Mapping[str, "Tensor"]], "tuple[Tensor, dict[str, Mean]]"]
"""Log-probs ``[tokens]`` of the marked tokens of a micro-batch and their signals -> (summed loss, metrics)."""


@dataclass(frozen=True)
class StepReport:
    """What an optimiser step did. Where ``applied`` is False something was not finite and nothing was updated."""

    applied: bool
    grad_norm: float


class StaleTeacherError(RuntimeError):
    """The teacher was to follow the student without a copy of its own, and the student has moved since."""


class Engine(ABC):
    """A causal language model that samples, scores and learns."""

    tokenizer: Any
    """The tokenizer of ``transformers`` that belongs to the weights, with its chat template."""

    stop_tokens: frozenset[int]
    """Ids that end a turn."""

    max_length: int
    """The most tokens a sequence may have."""

    @abstractmethod
    async def sample(self, request: SampleRequest) -> Sample:
        """Sample a continuation. Many requests may be under way at once, one of each session.

        Raises:
            ValueError: if the request is longer than `max_length`, asks for or continues nothing, or does not extend
                its session.
            RuntimeError: if decoding failed or the session was ended meanwhile.
        """

    @abstractmethod
    def end_session(self, session: str) -> None:
        """The episode is over: free what was kept for it. Unknown sessions are ignored."""

    @abstractmethod
    def score(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
        distribution: bool = False,
    ) -> list[Tensor]:
        """Log-probs of the marked tokens, in float32, on the CPU, one tensor per sequence.

        Returns:
            ``[marked]`` tensors; with `distribution` the whole ``[marked, vocabulary]``.

        Raises:
            ValueError: if a sequence is longer than `max_length`.
            StaleTeacherError: for the teacher, where it keeps no copy and the student moved since the last sync.
        """

    def score_top_k(
        self,
        sequences: Sequence[TokenSequence],
        k: int,
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
    ) -> list[TopK]:
        """What `score` says of the whole vocabulary in ``[marked, k + 1]`` numbers, one `TopK` per sequence.

        In float32, on the CPU. This one is made from whole distributions, a sequence at a time; an engine that holds
        them elsewhere should not bring them here.

        Raises:
            ValueError: as `score`, or if `k` is not at least 1 and less than the vocabulary.
        """
        from skillsd.engines.candidates import whole_to_top_k

        return [
            whole_to_top_k(sequence, self.score([sequence], weights, temperature=temperature, distribution=True)[0], k)
            for sequence in sequences
        ]

    @abstractmethod
    def forward_backward(
        self,
        batch: Sequence[TrainItem],
        loss: LossFunction,
        *,
        temperature: float = 1.0,
        distribution: bool = False,
    ) -> dict[str, Mean]:
        """Accumulate the gradient of `loss`, summed over micro-batches. The caller normalises by global counts.

        The loss gets the log-probs of the marked tokens and, with `distribution`, of all ``[tokens, vocabulary]``. With
        `distribution` and a signal ``candidates`` (int64 ids ``[marked, k]``, distinct in each row) those are the
        candidates' and, last, the log of the mass of all other tokens, ``[tokens, k + 1]``. With a teacher's `TopK.ids`
        as candidates that is aligned with its `TopK.logprobs`. The loss gets ``candidates`` like any other signal.

        Raises:
            ValueError: if a sequence is longer than `max_length`, or `candidates` are of another shape or type, as many
                as the vocabulary, or beyond it.
        """

    @abstractmethod
    def step(self, learning_rate: float) -> StepReport:
        """Clip the gradient, update, forget the gradient and all KV caches.

        If the gradient, or a loss that it came from, is not finite, nothing is updated (`StepReport.applied` is False)
        and the gradient is forgotten.
        """

    @abstractmethod
    def sync_teacher(self, rate: float = 1.0) -> None:
        """The teacher's weights become ``(1 - rate) * teacher + rate * student``, the student's as of this moment.

        With 1 the teacher is the student; smaller rates, call by call, make it an exponential moving average. A teacher
        that is another model stays as it is.

        Raises:
            ValueError: if `rate` is not in (0, 1], or is below 1 where the teacher keeps no weights of its own.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights (safetensors, with tokenizer), optimiser, teacher and RNG state into an existing folder."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take up what `save` wrote: training then goes on bit for bit."""

    def close(self) -> None:  # noqa: B027  most engines have nothing to end
        """Nothing is asked of this engine any more: end whatever runs outside of this process for it."""
