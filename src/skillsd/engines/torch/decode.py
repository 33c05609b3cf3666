"""Continuous batching: requests join and leave the decode batch at any step; KV caches are kept between turns.

The decoder runs in the event loop: one decoding step, then the tasks that became ready, then the next step. Without
threads or clocks, a run with in-process environments is deterministic.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skillsd.engines.base import SampleRequest
from skillsd.engines.torch.attention import CachedPlan, KVPool
from skillsd.engines.torch.memory import explained
from skillsd.errors import EngineFailedError

Forward = Callable[[Tensor, CachedPlan, Tensor], Tensor]
"""(packed ids ``[tokens]``, plan, positions ``[n]`` in the packed row) -> logits ``[n, vocab]`` there."""

Decoded = tuple[tuple[int, ...], tuple[float, ...], bool]
"""Sampled ids, their log-probs, and whether the last one is a stop token."""

PREFILL_ALONE_TOKENS = 64
"""Requests with more new tokens than this are prefilled separately, so they don't pad the rest of the batch."""

PREFILL_BATCH_TOKENS = 16_384
"""The most tokens in one prefill pass, including padding to the longest request."""

PREFILL_CHUNK_TOKENS = 1024
"""The most tokens of one request in a prefill pass, which bounds the attention mask's rows."""

GATHER_MILLISECONDS = 10
"""An idle decoder waits up to this long before it starts, as long as more requests arrive."""


@dataclass
class _Session:
    """An episode and its row in the pool. The keys and values of its first `cached` tokens are there."""

    name: str
    row: int
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    prompt_length: int = 0
    used: int = 0  # clock of the last request, for eviction
    request: SampleRequest | None = None
    future: asyncio.Future[Decoded] | None = None
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rng: random.Random = field(default_factory=random.Random)


class Decoder:
    """The decode batch of one set of weights."""

    def __init__(self, forward: Forward, stop_tokens: frozenset[int], device: torch.device, max_sessions: int) -> None:
        self._forward, self._stop, self._device = forward, stop_tokens, device
        self._max_sessions = max_sessions
        self._pool = KVPool()
        self._sessions: dict[str, _Session] = {}
        self._rows: list[_Session] = []  # row -> session; sessions always fill the first rows
        self._queue: list[tuple[SampleRequest, asyncio.Future[Decoded]]] = []
        self._pump: asyncio.Task[None] | None = None
        self._clock = 0
        self._unnamed = 0  # number of requests without a session so far

    async def sample(self, request: SampleRequest) -> Decoded:
        future: asyncio.Future[Decoded] = asyncio.get_running_loop().create_future()
        self._queue.append((request, future))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.ensure_future(self._run())
        return await future

    def end_session(self, name: str) -> None:
        session = self._sessions.pop(name, None)
        if session is None:
            return
        last = self._rows.pop()
        if session.future is not None and not session.future.done():
            session.future.set_exception(RuntimeError(f"session {name!r} was ended while it was being sampled"))
        if last is not session:  # the last row closes the gap
            with torch.inference_mode():
                self._pool.move([last.row], [session.row], last.cached)
            last.row = session.row
            self._rows[last.row] = last

    def clear(self) -> None:
        """Drop all KV caches, because the weights change. Episodes under way are prefilled again."""
        if any(session.future is not None and not session.future.cancelled() for session in self._rows):
            raise RuntimeError("the weights were changed while a request was being sampled with them")
        self._sessions.clear()
        self._rows.clear()

    def release(self) -> None:
        """Free the memory of the KV caches for the update, if no episode is under way."""
        if not self._rows and not self._queue:
            self._pool = self._pool.emptied()

    # -- the decode loop ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._gather()
            while self._queue or any(session.request for session in self._rows):
                with torch.inference_mode(), explained("sampling"):
                    self._admit()
                    self._step()
                await asyncio.sleep(0)
        except BaseException as error:
            # Fail all pending requests with the reason, so that none waits for ever.
            waiting = [future for _, future in self._queue] + [s.future for s in self._rows if s.future]
            self._queue.clear()
            self._rows.clear()
            self._sessions.clear()
            self._pool = KVPool()  # it may hold infinities now, which a mask does not remove: 0 * inf is nan
            known = isinstance(error, EngineFailedError | FloatingPointError)
            for future in waiting:
                if not future.done():
                    future.set_exception(error if known else RuntimeError(f"decoding failed: {error!r}"))
            if not isinstance(error, Exception):
                raise

    async def _gather(self) -> None:
        """Before an idle decoder starts, wait for requests that are about to arrive.

        Environments of similar speed answer within milliseconds of each other. Starting with the first request would
        decode it alone, out of step with the others from then on.
        """
        await asyncio.sleep(0)  # in-process environments have finished by now
        for _ in range(GATHER_MILLISECONDS):
            waiting = len(self._queue)
            if waiting >= len(self._rows):
                return
            await asyncio.sleep(0.001)
            if len(self._queue) == waiting:
                return

    def _admit(self) -> None:
        """Give queued requests rows, as long as there are any, and prefill their new tokens."""
        left: list[tuple[SampleRequest, asyncio.Future[Decoded]]] = []
        fresh: list[_Session] = []
        for request, future in self._queue:
            if future.cancelled():
                continue
            try:
                session = self._open(request)
            except ValueError as error:
                future.set_exception(error)
                continue
            if session is None:
                left.append((request, future))
                continue
            self._clock += 1
            session.used, session.request, session.future = self._clock, request, future
            session.sampled, session.logprobs = [], []
            session.rng = random.Random(request.seed)
            if not session.tokens:
                session.prompt_length = len(request.tokens)
                fresh.append(session)
            session.tokens = list(request.tokens)
        self._queue = left
        active = [session for session in self._rows if session.request]
        if active:
            room = max(len(s.tokens) + s.request.max_tokens for s in active if s.request)
            self._pool.reserve(len(self._rows), room)
        if fresh:
            self._share_prompts(fresh)
        self._prefill([s for s in active if len(s.tokens) - s.cached > PREFILL_ALONE_TOKENS])

    def _open(self, request: SampleRequest) -> _Session | None:
        """The request's session, created if necessary; None if requests under way occupy all rows."""
        name = request.session
        if name is None:
            self._unnamed += 1
            name = f"unnamed request {self._unnamed}"
        session = self._sessions.get(name)
        if session is not None:
            if session.request is not None:
                raise ValueError(f"session {name!r} has a request under way already")
            kept = session.tokens
            if tuple(kept) != request.tokens[: len(kept)]:
                raise ValueError(
                    f"session {name!r}: the request's tokens do not extend what the session holds "
                    f"({len(kept)} tokens); a trajectory's prefix must never change"
                )
            return session
        if len(self._rows) >= self._max_sessions:
            idle = [session for session in self._rows if session.request is None]
            if not idle:
                return None
            self.end_session(min(idle, key=lambda session: session.used).name)
        session = _Session(name, len(self._rows))
        self._sessions[name] = session
        self._rows.append(session)
        return session

    def _share_prompts(self, fresh: list[_Session]) -> None:
        """Prefill each distinct prompt once, all but its last token, and copy it to the rest of its group."""
        known = {
            tuple(s.tokens[: s.prompt_length]): s
            for s in self._rows
            if s.prompt_length and s.cached >= s.prompt_length - 1
        }
        first: dict[tuple[int, ...], _Session] = {}
        copies: list[tuple[_Session, _Session]] = []
        for session in fresh:
            prompt = tuple(session.tokens)
            source = known.get(prompt) or first.setdefault(prompt, session)
            if source is not session:
                copies.append((source, session))
        self._prefill(list(first.values()))
        for source, session in copies:
            session.cached = session.prompt_length - 1
            self._pool.move([source.row], [session.row], session.cached)

    def _prefill(self, sessions: list[_Session]) -> None:
        """Compute the keys and values of all tokens but each session's last."""
        nowhere = torch.empty(0, dtype=torch.long, device=self._device)  # no logits

        def left(session: _Session) -> int:
            return len(session.tokens) - 1 - session.cached

        while ready := [session for session in sessions if left(session)]:
            ready.sort(key=left, reverse=True)  # similar lengths together
            part = ready[: PREFILL_BATCH_TOKENS // min(left(ready[0]), PREFILL_CHUNK_TOKENS)]
            part.sort(key=lambda session: session.row)
            self._feed(part, [min(left(session), PREFILL_CHUNK_TOKENS) for session in part], nowhere)

    def _feed(self, sessions: list[_Session], counts: list[int], places: Tensor | None) -> Tensor:
        """Run the next `counts` tokens of each session; logits ``[sessions, vocab]`` at the last of each."""
        plan = CachedPlan(self._pool, [s.row for s in sessions], [s.cached for s in sessions], counts, self._device)
        ids = [t for s, n in zip(sessions, counts, strict=True) for t in s.tokens[s.cached : s.cached + n]]
        logits = self._forward(torch.tensor(ids, device=self._device), plan, plan.last if places is None else places)
        for session, count in zip(sessions, counts, strict=True):
            session.cached += count
        return logits

    def _compact(self, active: list[_Session]) -> None:
        """Move the active sessions to the first rows, so that attention reads those in place, without a copy."""
        out = [s for s in self._rows[: len(active)] if s.request is None]
        into = [s for s in active if s.row >= len(active)]
        if not out:
            return
        length = max(s.cached for s in out + into)
        a, b = [s.row for s in out], [s.row for s in into]
        self._pool.move(a + b, b + a, length)
        for idle, busy in zip(out, into, strict=True):
            idle.row, busy.row = busy.row, idle.row
            self._rows[idle.row], self._rows[busy.row] = idle, busy

    def _step(self) -> None:
        """One token for every request under way."""
        for session in list(self._rows):  # drop cancelled requests (a deadline has passed)
            if session.future is not None and session.future.cancelled():
                self._finish(session)
                self.end_session(session.name)
        active = [session for session in self._rows if session.request]
        if not active:
            return
        self._compact(active)
        active.sort(key=lambda session: session.row)
        logits = self._feed(active, [len(s.tokens) - s.cached for s in active], None)
        temperatures = [s.request.temperature for s in active if s.request]
        tokens, logprobs = choose(logits, temperatures, [s.rng.random() for s in active])
        for session, token, logprob in zip(active, tokens, logprobs, strict=True):
            assert session.request is not None
            session.tokens.append(token)
            session.sampled.append(token)
            session.logprobs.append(logprob)
            stopped = token in self._stop
            if not stopped and len(session.sampled) < session.request.max_tokens:
                continue
            sample = (tuple(session.sampled), tuple(session.logprobs), stopped)
            future, unnamed = session.future, session.request.session is None
            self._finish(session)
            if unnamed:
                self.end_session(session.name)
            if future is not None and not future.done():
                future.set_result(sample)

    @staticmethod
    def _finish(session: _Session) -> None:
        session.request = session.future = None


def choose(logits: Tensor, temperatures: list[float], uniforms: list[float]) -> tuple[list[int], list[float]]:
    """Sample one token per row: the inverse of the cumulative distribution at the row's uniform number.

    The choice depends only on the row's logits and number, so an episode samples the same tokens in any batch.
    Temperature 0 takes the most likely token and reports its log-prob at temperature 1.

    Args:
        logits: ``[rows, vocab]``.
        temperatures: one per row.
        uniforms: one per row, in [0, 1).

    Returns:
        The ids and their log-probs under the sampling distribution (in float32), one per row.

    Raises:
        FloatingPointError: if a row has nan or infinity among its logits. (Some may be minus infinity.)
    """
    # A division, as in scoring: multiplying by 1 / t rounds differently, by 1e-5 where t is small.
    divisor = torch.tensor([t if t > 0 else 1.0 for t in temperatures], device=logits.device)
    logprobs = torch.log_softmax(logits.float() / divisor.unsqueeze(1), dim=-1)
    # float64: a float32 running sum over 150k tokens would lose the small probabilities at its end.
    cumulative = torch.cumsum(logprobs.double().exp(), dim=-1)
    target = torch.tensor(uniforms, dtype=torch.float64, device=logits.device).unsqueeze(1) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    if not all(t > 0 for t in temperatures):
        greedy = torch.tensor([t <= 0 for t in temperatures], device=logits.device).unsqueeze(1)
        ids = torch.where(greedy, logprobs.argmax(dim=-1, keepdim=True), ids)
    chosen: list[float] = logprobs.gather(1, ids).squeeze(1).tolist()
    if any(map(math.isnan, chosen)):  # one of them makes the whole row nan
        raise FloatingPointError("logits are nan or infinite")
    return ids.squeeze(1).tolist(), chosen
