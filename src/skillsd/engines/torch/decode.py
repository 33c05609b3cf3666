"""Continuous batching: requests join and leave the decode batch at any step; KV caches are kept between turns.

The decoder runs in the event loop: one decoding step, then the tasks that became ready, then the next step. Without
threads or clocks, a run with in-process environments is deterministic.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod

import torch

from skillsd.engines.base import SampleRequest
from skillsd.engines.torch.memory import explained
from skillsd.engines.torch.steps import Awaited, Decoded, Session, Steps
from skillsd.errors import EngineFailedError

GATHER_MILLISECONDS = 10
"""An idle decoder waits up to this long before it starts, as long as more requests arrive."""


class DecodeLoop(ABC):
    """Requests to sample, and the loop that works on them in the event loop as long as there are any."""

    def __init__(self) -> None:
        self._queue: list[tuple[SampleRequest, Awaited]] = []
        self._pump: asyncio.Task[None] | None = None

    async def sample(self, request: SampleRequest) -> Decoded:
        future: asyncio.Future[Decoded] = asyncio.get_running_loop().create_future()
        self.submit(request, future)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.ensure_future(self._run())
        return await future

    def submit(self, request: SampleRequest, future: Awaited) -> None:
        """Queue a request, for the next `advance`."""
        self._queue.append((request, future))

    @abstractmethod
    def end_session(self, name: str) -> None:
        """Free what is kept for a session. Unknown sessions are ignored."""

    @abstractmethod
    def clear(self) -> None:
        """Drop all KV caches, because the weights change. Episodes under way are prefilled again."""

    @abstractmethod
    def release(self) -> None:
        """Free the memory of the KV caches for the update, if no episode is under way."""

    @abstractmethod
    def advance(self) -> None:
        """Admit queued requests, and decode one token or a few for every request under way."""

    @abstractmethod
    def _under_way(self) -> list[Awaited]:
        """The futures of requests that were admitted."""

    @abstractmethod
    def _sessions_kept(self) -> int: ...

    @abstractmethod
    def _reset(self) -> None:
        """Drop everything after a failure."""

    async def _run(self) -> None:
        try:
            await self._gather()
            while self._queue or self._under_way():
                self.advance()
                await asyncio.sleep(0)
        except BaseException as error:
            # Fail all pending requests with the reason, so that none waits for ever.
            waiting = [future for _, future in self._queue] + self._under_way()
            self._queue.clear()
            self._reset()
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
            if waiting >= self._sessions_kept():
                return
            await asyncio.sleep(0.001)
            if len(self._queue) == waiting:
                return


class Decoder(DecodeLoop):
    """The decode batch of one set of weights, which `steps` computes with."""

    def __init__(self, steps: Steps, stop_tokens: frozenset[int], max_sessions: int) -> None:
        super().__init__()
        self.steps, self._max_sessions = steps, max_sessions
        self.set_stop_tokens(stop_tokens)
        self._sessions: dict[str, Session] = {}
        self._rows: list[Session] = []  # row -> session; sessions always fill the first rows
        self._clock = 0
        self._unnamed = 0  # number of requests without a session so far

    def set_stop_tokens(self, tokens: frozenset[int]) -> None:
        """End turns at these tokens from now on. No request may be under way."""
        self._stop = tokens
        self.steps.set_stop_tokens(tokens)

    def end_session(self, name: str) -> None:
        session = self._sessions.pop(name, None)
        if session is None:
            return
        last = self._rows.pop()
        if session.future is not None and not session.future.done():
            session.future.set_exception(RuntimeError(f"session {name!r} was ended while it was being sampled"))
        if last is not session:  # the last row closes the gap
            with torch.inference_mode():
                self.steps.pool.move([last.row], [session.row], last.cached)
            last.row = session.row
            self._rows[last.row] = last

    def clear(self) -> None:
        if any(session.future is not None and not session.future.cancelled() for session in self._rows):
            raise RuntimeError("the weights were changed while a request was being sampled with them")
        self._sessions.clear()
        self._rows.clear()

    def release(self) -> None:
        if not self._rows and not self._queue:
            self.steps.release()

    # -- the decode loop ----------------------------------------------------------------------------------------

    def advance(self) -> None:
        with torch.inference_mode(), explained("sampling"):
            self._admit()
            self._step()

    def _under_way(self) -> list[Awaited]:
        return [session.future for session in self._rows if session.future]

    def _sessions_kept(self) -> int:
        return len(self._rows)

    def _reset(self) -> None:
        self._rows.clear()
        self._sessions.clear()
        self.steps.reset()

    def _admit(self) -> None:
        """Give queued requests rows, as long as there are any, and prefill their new tokens."""
        left: list[tuple[SampleRequest, Awaited]] = []
        fresh: list[Session] = []
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
            room = max(len(s.tokens) + s.active.max_tokens for s in active)
            self.steps.reserve(len(self._rows), room)
        if fresh:
            self._share_prompts(fresh)
        self.steps.prefill_observations(active)

    def _open(self, request: SampleRequest) -> Session | None:
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
        session = Session(name, len(self._rows))
        self._sessions[name] = session
        self._rows.append(session)
        return session

    def _share_prompts(self, fresh: list[Session]) -> None:
        """Prefill each distinct prompt once, all but its last token, and copy it to the rest of its group."""
        known = {
            tuple(s.tokens[: s.prompt_length]): s
            for s in self._rows
            if s.prompt_length and s.cached >= s.prompt_length - 1
        }
        first: dict[tuple[int, ...], Session] = {}
        copies: list[tuple[Session, Session]] = []
        for session in fresh:
            prompt = tuple(session.tokens)
            source = known.get(prompt) or first.setdefault(prompt, session)
            if source is not session:
                copies.append((source, session))
        self.steps.prefill(list(first.values()))
        for _, session in copies:
            session.cached = session.prompt_length - 1
        # Beyond a shorter prompt's end a copy holds what is never read.
        longest = max((session.cached for _, session in copies), default=0)
        self.steps.pool.move([source.row for source, _ in copies], [session.row for _, session in copies], longest)

    def _compact(self, active: list[Session]) -> None:
        """Move the active sessions to the first rows, so that attention reads those in place, without a copy."""
        first = self.steps.rows_read(len(active))
        into = [s for s in active if s.row >= first]
        if not into:
            return
        out = [s for s in self._rows[:first] if s.request is None][: len(into)]
        length = max(s.cached for s in out + into)
        a, b = [s.row for s in out], [s.row for s in into]
        self.steps.pool.move(a + b, b + a, length)
        for idle, busy in zip(out, into, strict=True):
            idle.row, busy.row = busy.row, idle.row
            self._rows[idle.row], self._rows[busy.row] = idle, busy

    def _step(self) -> None:
        """One token or a few for every request under way."""
        for session in list(self._rows):  # drop cancelled requests (a deadline has passed)
            if session.future is not None and session.future.cancelled():
                self._finish(session)
                self.end_session(session.name)
        active = [session for session in self._rows if session.request]
        if not active:
            return
        self._compact(active)
        active.sort(key=lambda session: session.row)
        for session, found in zip(active, self.steps.decode(active), strict=True):
            for token, logprob in found:
                session.tokens.append(token)
                session.sampled.append(token)
                session.logprobs.append(logprob)
            stopped = session.sampled[-1] in self._stop
            if not stopped and session.remaining:
                continue
            sample = (tuple(session.sampled), tuple(session.logprobs), stopped)
            future, unnamed = session.future, session.active.session is None
            self._finish(session)
            if unnamed:
                self.end_session(session.name)
            if future is not None and not future.done():
                future.set_result(sample)

    @staticmethod
    def _finish(session: Session) -> None:
        session.request = session.future = None
