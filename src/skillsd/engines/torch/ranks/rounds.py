"""All ranks sample, in rounds: each decodes a step for its own sessions, then the episodes go on, then the next round.

So the requests that share a rank's batch depend on no clock, and with in-process environments a run is deterministic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from skillsd.engines.base import SampleRequest
from skillsd.engines.torch.decode import DecodeLoop, Decoder
from skillsd.engines.torch.steps import Awaited, Decoded


@dataclass
class Round:
    """What is new for one rank.

    Attributes:
        started: number of a request -> the request.
        cancelled: numbers of requests that are no longer awaited.
        ended: sessions that are over.
    """

    started: dict[int, SampleRequest] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


Finished = dict[int, Decoded | Exception]
"""Number of a request -> its result."""

UNNAMED = "request without a session"


@dataclass(frozen=True)
class _Pending:
    """A request under way."""

    session: str
    home: int
    future: Awaited


class RoundDecoder(DecodeLoop):
    """Rank 0's view of the decoders of all ranks.

    A session stays with its rank, which has its keys and values; a new one goes to the rank that has the fewest.

    Args:
        play: plays a round, given each rank's news.
    """

    def __init__(self, ranks: int, play: Callable[[Sequence[Round]], Sequence[Finished]]) -> None:
        super().__init__()
        self._play = play
        self._news = [Round() for _ in range(ranks)]
        self._homes: dict[str, int] = {}  # session, or name of a request without one -> its rank
        self._pending: dict[int, _Pending] = {}  # by the request's number
        self._started = 0

    def end_session(self, name: str) -> None:
        home = self._homes.pop(name, None)
        if home is not None:
            self._news[home].ended.append(name)

    def clear(self) -> None:
        """Ranks drop their caches themselves when the weights change."""
        if any(not future.cancelled() for future in self._under_way()):
            raise RuntimeError("the weights were changed while a request was being sampled with them")

    def release(self) -> None:
        if any(news.ended for news in self._news) and not self._queue and not self._pending:
            self.advance()

    def advance(self) -> None:
        for request, future in self._queue:
            self._started += 1
            self._start(request, future)
        self._queue.clear()
        for number, pending in list(self._pending.items()):
            if pending.future.cancelled():
                self._news[pending.home].cancelled.append(number)
                self._forget(number)
        news, self._news = self._news, [Round() for _ in self._news]
        for finished in self._play(news):
            for number, result in finished.items():
                future = self._forget(number)
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _start(self, request: SampleRequest, future: Awaited) -> None:
        name = f"{UNNAMED} {self._started}" if request.session is None else request.session
        if name not in self._homes:
            load = Counter(self._homes.values())
            self._homes[name] = min(range(len(self._news)), key=lambda rank: load[rank])
        home = self._homes[name]
        self._news[home].started[self._started] = request
        self._pending[self._started] = _Pending(name, home, future)

    def _forget(self, number: int) -> Awaited:
        pending = self._pending.pop(number)
        if pending.session.startswith(UNNAMED):
            del self._homes[pending.session]
        return pending.future

    def _under_way(self) -> list[Awaited]:
        return [pending.future for pending in self._pending.values()]

    def _sessions_kept(self) -> int:
        return len(self._homes)

    def _reset(self) -> None:
        self._pending.clear()
        self._homes.clear()


class RoundPlayer:
    """A rank's part in the rounds: its own decoder, and the requests that it works on."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._futures: dict[int, Future[Decoded]] = {}

    def play(self, news: Round) -> Finished:
        for session in news.ended:
            self._decoder.end_session(session)
        for number in news.cancelled:
            self._futures.pop(number, Future()).cancel()
        for number, request in news.started.items():
            self._futures[number] = Future()
            self._decoder.submit(request, self._futures[number])
        self._decoder.advance()
        finished: Finished = {}
        for number, future in list(self._futures.items()):
            if future.done():
                error = self._futures.pop(number).exception()
                finished[number] = error if isinstance(error, Exception) else future.result()
        return finished
