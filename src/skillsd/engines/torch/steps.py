"""What a decoder computes with: the sessions, and the plain way to prefill and decode them.

`PlainSteps` builds each pass on the CPU for just the tokens that are there. On a CPU that is fastest, and it is the
reference of `static_steps.StaticSteps`, which needs no host between tokens.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skillsd.engines.base import SampleRequest
from skillsd.engines.torch.attention import CachedPlan, Plan
from skillsd.engines.torch.kv_pool import KVPool
from skillsd.engines.torch.sampling import choose

Forward = Callable[[Tensor, Plan, Tensor | None], Tensor]
"""(packed ids ``[tokens]``, plan, positions ``[n]`` in the packed row) -> logits ``[n, vocab]`` there; None: of all
tokens."""

Decoded = tuple[tuple[int, ...], tuple[float, ...], bool]
"""Sampled ids, their log-probs, and whether the last one is a stop token."""

Awaited = asyncio.Future[Decoded] | concurrent.futures.Future[Decoded]
"""The result of a request: awaited in an event loop, or looked up without one."""

PREFILL_ALONE_TOKENS = 64
"""Requests with more new tokens than this are prefilled separately, so they don't pad the rest of the batch."""

PREFILL_BATCH_TOKENS = 16_384
"""The most tokens in one prefill pass, including padding to the longest request."""

PREFILL_CHUNK_TOKENS = 1024
"""The most tokens of one request in a prefill pass, which bounds the attention mask's rows."""


@dataclass
class Session:
    """An episode and its row in the pool. The keys and values of its first `cached` tokens are there."""

    name: str
    row: int
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    prompt_length: int = 0
    used: int = 0  # clock of the last request, for eviction
    request: SampleRequest | None = None
    future: Awaited | None = None
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rng: random.Random = field(default_factory=random.Random)

    @property
    def active(self) -> SampleRequest:
        """The request under way."""
        assert self.request is not None
        return self.request

    @property
    def remaining(self) -> int:
        """Tokens that the request under way may still sample."""
        return self.active.max_tokens - len(self.sampled)

    @property
    def uncached(self) -> int:
        """Tokens to prefill: without keys and values, all but the last."""
        return len(self.tokens) - 1 - self.cached


class Steps(ABC):
    """Computes keys and values in `pool`, and the next tokens of sessions, by `forward`."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self.forward, self.device = forward, device
        with torch.inference_mode():  # learn the forms of keys and values from one token
            pool = KVPool(1, 1)
            plan = CachedPlan(pool, [0], [0], [1], device)
            forward(torch.zeros(1, dtype=torch.long, device=device), plan, plan.last[:0])
        self.pool = pool.emptied()

    def set_stop_tokens(self, tokens: frozenset[int]) -> None:  # noqa: B027 (most steps leave them to the decoder)
        """These tokens end a turn."""

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` sessions of `length` tokens."""
        self.pool.reserve(rows, length)

    def rows_read(self, sessions: int) -> int:
        """Which rows sessions should lie in, so that attention reads them in place: the first ones, this many."""
        return sessions

    def prefill(self, sessions: Sequence[Session]) -> None:
        """Compute the keys and values of all tokens but each session's last."""
        nowhere = torch.empty(0, dtype=torch.long, device=self.device)  # no logits
        while ready := [session for session in sessions if session.uncached]:
            ready.sort(key=lambda session: session.uncached, reverse=True)  # similar lengths together
            part = ready[: PREFILL_BATCH_TOKENS // min(ready[0].uncached, PREFILL_CHUNK_TOKENS)]
            part.sort(key=lambda session: session.row)
            self._feed(part, [min(session.uncached, PREFILL_CHUNK_TOKENS) for session in part], nowhere)

    def _feed(self, sessions: Sequence[Session], counts: Sequence[int], places: Tensor | None) -> Tensor:
        """Run the next `counts` tokens of each session; logits ``[sessions, vocab]`` at the last of each."""
        plan = CachedPlan(self.pool, [s.row for s in sessions], [s.cached for s in sessions], counts, self.device)
        ids = torch.tensor(
            [t for s, n in zip(sessions, counts, strict=True) for t in s.tokens[s.cached : s.cached + n]]
        )
        if self.device.type == "cuda":
            ids = ids.pin_memory()
        logits = self.forward(ids.to(self.device, non_blocking=True), plan, plan.last if places is None else places)
        for session, count in zip(sessions, counts, strict=True):
            session.cached += count
        return logits

    @abstractmethod
    def prefill_observations(self, sessions: Sequence[Session]) -> None:
        """Before `decode`: prefill what `decode` does not take itself."""

    @abstractmethod
    def decode(self, sessions: Sequence[Session]) -> list[list[tuple[int, float]]]:
        """For each session, in the order of their rows, its next tokens with their log-probs: at least one.

        The last one ends the turn, or none does. A session that samples a stop token gets no token after it.

        Raises:
            FloatingPointError: if logits are nan or infinite.
        """

    def release(self) -> None:
        """Free the memory of keys and values; there are no sessions."""
        self.pool = self.pool.emptied()

    def reset(self) -> None:
        """Forget everything after a failed pass."""
        self.pool = self.pool.emptied()  # it may hold infinities, which a mask does not remove: 0 * inf is nan


class PlainSteps(Steps):
    """One pass per token, over just the tokens that are there, built on the CPU."""

    def prefill_observations(self, sessions: Sequence[Session]) -> None:
        self.prefill([s for s in sessions if s.uncached >= PREFILL_ALONE_TOKENS])

    def decode(self, sessions: Sequence[Session]) -> list[list[tuple[int, float]]]:
        logits = self._feed(sessions, [s.uncached + 1 for s in sessions], None)
        temperatures = [s.active.temperature for s in sessions]
        tokens, logprobs = choose(logits, temperatures, [s.rng.random() for s in sessions])
        return [[pair] for pair in zip(tokens, logprobs, strict=True)]
