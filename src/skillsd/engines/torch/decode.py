"""Decoding many episodes at once: requests join and leave the batch at any step, keys and values stay between turns.

The decoder works inside the event loop: one step of decoding, then whoever became ready runs, then the next step. With
in-process environments a run is therefore deterministic: no threads, no clock.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skillsd.engines.base import SampleRequest
from skillsd.engines.torch.attention import CachedPlan, KVPool

Forward = Callable[[Tensor, CachedPlan, Tensor], Tensor]
"""(packed ids ``[tokens]``, plan, places ``[n]`` in the packed row) -> logits ``[n, vocabulary]`` there."""

Decoded = tuple[tuple[int, ...], tuple[float, ...], bool]
"""Sampled ids, their log-probs, and whether the last one is a stop token."""

PREFILL_ALONE_TOKENS = 64
"""Requests with more new tokens than this are prefilled separately, so they don't pad the rest of the batch."""

PREFILL_BATCH_TOKENS = 16_384
"""The most tokens in one forward pass of prefill, padding to the longest request included."""

PREFILL_CHUNK_TOKENS = 1024
"""The most tokens of one request in such a pass: attention's mask has this many rows."""

GATHER_MILLISECONDS = 10
"""The first of many requests waits at most this long for the others, as long as more of them come."""


@dataclass
class _Session:
    """An episode's row in the pool. `cached` tokens have their keys and values there."""

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
        self._unnamed = 0  # requests so far that belong to no session

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
        """Forget all keys and values: the weights have changed. Episodes under way are prefilled again."""
        if any(session.future is not None and not session.future.cancelled() for session in self._rows):
            raise RuntimeError("the weights were changed while something was being sampled with them")
        self._sessions.clear()
        self._rows.clear()

    def release(self) -> None:
        """Give the memory of keys and values back, if no episode is under way: the update needs it."""
        if not self._rows and not self._queue:
            self._pool = self._pool.emptied()

    # -- the decode loop ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._gather()
            while self._queue or any(session.request for session in self._rows):
                with torch.inference_mode():
                    self._admit()
                    self._step()
                await asyncio.sleep(0)
        except BaseException as error:
            # Nobody may wait for ever: whoever asked is told why the loop ended.
            waiting = [future for _, future in self._queue] + [s.future for s in self._rows if s.future]
            self._queue.clear()
            self._rows.clear()
            self._sessions.clear()
            self._pool = KVPool()  # what stopped it may have left infinities, which reach others through a mask
            for future in waiting:
                if not future.done():
                    future.set_exception(RuntimeError(f"decoding failed: {error!r}"))
            if not isinstance(error, Exception):
                raise

    async def _gather(self) -> None:
        """Before decoding begins anew, let everyone who is about to ask put its request in the queue.

        Environments that take equally long answer within milliseconds of each other. Whoever began at the first answer
        would decode alone, and never in step with the others again.
        """
        await asyncio.sleep(0)  # in-process environments are through by now
        for _ in range(GATHER_MILLISECONDS):
            waiting = len(self._queue)
            if waiting >= len(self._rows):
                return
            await asyncio.sleep(0.001)
            if len(self._queue) == waiting:
                return

    def _admit(self) -> None:
        """Give each waiting request a row, as far as there are rows, and prefill what is new."""
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
        """The request's session, a new one if need be; None if every row is taken by a request under way."""
        if not request.tokens:
            raise ValueError("a request needs at least one token to continue from")
        if request.max_tokens < 1:
            raise ValueError(f"a request must allow at least one token, got max_tokens={request.max_tokens}")
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
        """Compute keys and values of everything but the last token."""
        nowhere = torch.empty(0, dtype=torch.long, device=self._device)  # no logits are wanted

        def left(session: _Session) -> int:
            return len(session.tokens) - 1 - session.cached

        while ready := [session for session in sessions if left(session)]:
            ready.sort(key=left, reverse=True)  # of like length together
            part = ready[: PREFILL_BATCH_TOKENS // min(left(ready[0]), PREFILL_CHUNK_TOKENS)]
            part.sort(key=lambda session: session.row)
            self._feed(part, [min(left(session), PREFILL_CHUNK_TOKENS) for session in part], nowhere)

    def _feed(self, sessions: list[_Session], counts: list[int], places: Tensor | None) -> Tensor:
        """Run the next `counts` tokens of each session; logits ``[sessions, vocabulary]`` at their last ones."""
        plan = CachedPlan(self._pool, [s.row for s in sessions], [s.cached for s in sessions], counts, self._device)
        ids = [t for s, n in zip(sessions, counts, strict=True) for t in s.tokens[s.cached : s.cached + n]]
        logits = self._forward(torch.tensor(ids, device=self._device), plan, plan.last if places is None else places)
        for session, count in zip(sessions, counts, strict=True):
            session.cached += count
        return logits

    def _compact(self, active: list[_Session]) -> None:
        """Bring the active sessions to the front, so that attention reads their rows in place, without a copy."""
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
        for session in list(self._rows):  # whoever gave up waiting (a deadline) leaves the batch
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
    """Sample one token a row by inverting the cumulative distribution at the row's own uniform number.

    A row's choice depends on its logits and its number alone, so an episode samples the same tokens whoever shares its
    batch. Temperature 0 takes the most likely token; its log-prob is then reported at temperature 1.

    Args:
        logits: ``[rows, vocabulary]``.
        temperatures: one a row.
        uniforms: one a row, in [0, 1).

    Returns:
        The ids and their log-probs under the sampling distribution (computed in float32), one a row.
    """
    # A division, as in `score`: multiplying by 1 / t rounds differently, by 1e-5 where t is small.
    divisor = torch.tensor([t if t > 0 else 1.0 for t in temperatures], device=logits.device)
    logprobs = torch.log_softmax(logits.float() / divisor.unsqueeze(1), dim=-1)
    # float64: over 150k tokens a float32 running sum would lose the small probabilities at its end.
    cumulative = torch.cumsum(logprobs.double().exp(), dim=-1)
    target = torch.tensor(uniforms, dtype=torch.float64, device=logits.device).unsqueeze(1) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    if not all(t > 0 for t in temperatures):
        greedy = torch.tensor([t <= 0 for t in temperatures], device=logits.device).unsqueeze(1)
        ids = torch.where(greedy, logprobs.argmax(dim=-1, keepdim=True), ids)
    return ids.squeeze(1).tolist(), logprobs.gather(1, ids).squeeze(1).tolist()
