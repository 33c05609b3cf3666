"""Rank 0 leads: it has every rank make the same calls, takes part in each itself, and collects the answers.

Orders and answers are pickled and go through a Unix socket for each of the other ranks. So a rank that ends closes its
socket, which rank 0 notices at once; while rank 0 samples or writes files, the others wait without a deadline; and an
answer that does not come in time has a rank's name. What ranks compute together, such as the sum of a gradient, goes
through torch.distributed, with the same deadline.
"""

from __future__ import annotations

import pickle
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from skillsd.errors import EngineFailedError, RanksLostError, UserError

START_SECONDS = 600.0
"""The longest that a rank may take to start."""

GRACE_SECONDS = 5.0
"""After a failure at rank 0, how long it waits for the other ranks' reasons."""


class Store(Protocol):
    """The part of `torch.distributed.Store` that ranks find each other by."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...


LOST = "lost the other ranks"


@dataclass(frozen=True)
class Failed:
    """An answer: the order failed.

    Attributes:
        lost: because other ranks did not take part in what ranks compute together.
    """

    reason: str
    lost: bool = False


class Ended:
    """In place of an answer: the rank has ended."""


class Ranks:
    """The other ranks, for rank 0.

    Args:
        connections: rank -> its socket.
        seconds: the longest that a rank may keep the others waiting.
    """

    def __init__(self, connections: Mapping[int, Connection], seconds: float) -> None:
        self._connections, self.seconds = connections, seconds
        self._subjects: list[Any] = []
        self._lock = threading.Lock()  # one order at a time, also where scoring runs in a thread
        self._failure: BaseException | None = None

    @property
    def size(self) -> int:
        """Number of ranks, this one included."""
        return len(self._connections) + 1

    @property
    def failed(self) -> bool:
        """Whether an order has failed, so that there can be no other."""
        return self._failure is not None

    def make(self, factory: Callable[..., Any], *args: Any, **options: Any) -> Subject:
        """Call `factory` in every rank, and keep what it returns there. It may take as long as a start."""
        self._order(None, factory, [(args, options)] * self.size, max(self.seconds, START_SECONDS))
        return Subject(self, len(self._subjects) - 1)

    def _order(
        self, subject: int | None, call: Any, inputs: Sequence[tuple[Any, Any]], seconds: float | None = None
    ) -> list[Any]:
        """Carry out an order in all ranks; returns the answers, in the order of the ranks.

        Args:
            seconds: the longest to wait for an answer, instead of `self.seconds`.

        Raises:
            EngineFailedError: if it failed in another rank, with the rank and the reason.
            RanksLostError: if another rank has ended or gave no answer.
            Exception: what it raises in this rank.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            orders = {rank: pickle.dumps((subject, call, *inputs[rank])) for rank in self._connections}
            try:
                for rank, order in orders.items():
                    self._connections[rank].send_bytes(order)
                own = carry_out(self._subjects, subject, call, *inputs[0])
            except BaseException as error:  # also an interrupt: the other ranks are in the middle of the order
                self._failure = self._reason_of(error)
                if self._failure is error:
                    raise
                raise self._failure from error
            answers = self._answers(seconds or self.seconds)
            self._failure = self._failure_in(answers) or self._silence_in(answers)
            if self._failure is not None:
                raise self._failure
            return [own, *(answers[rank] for rank in self._connections)]

    def _answers(self, seconds: float) -> dict[int, Any]:
        """Rank -> its answer; `Ended` if it has. Ranks that don't answer in time are missing."""
        found: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while left := {c: rank for rank, c in self._connections.items() if rank not in found}:
            ready = wait(list(left), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    found[left[connection]] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    found[left[connection]] = Ended()
        return dict(sorted(found.items()))

    def _failure_in(self, answers: Mapping[int, Any]) -> EngineFailedError | None:
        """A failure that is not the consequence of another one."""
        for rank, answer in answers.items():
            if isinstance(answer, Failed) and not answer.lost:
                return EngineFailedError(f"rank {rank} failed: {answer.reason}")
        if ended := [rank for rank, answer in answers.items() if isinstance(answer, Ended)]:
            return RanksLostError(f"{_named(ended)} ended without a reason: killed, perhaps for want of memory")
        return None

    def _silence_in(self, answers: Mapping[int, Any]) -> EngineFailedError | None:
        """Ranks that give no answer, or have waited for others in vain."""
        if silent := [rank for rank in self._connections if rank not in answers]:
            return RanksLostError(
                f"{_named(silent)} gave no answer within {self.seconds:g} s (engine.rank_seconds): it hangs, or needs "
                "more time"
            )
        lost = [f"rank {rank} {answer.reason}" for rank, answer in answers.items() if isinstance(answer, Failed)]
        return RanksLostError(f"{lost[0]}, after {self.seconds:g} s at most (engine.rank_seconds)") if lost else None

    def _reason_of(self, error: BaseException) -> BaseException:
        """The reason for an error in this rank: another rank may have failed in what they compute together."""
        if not isinstance(error, Exception) or isinstance(error, UserError | EngineFailedError):
            return error
        answers = self._answers(GRACE_SECONDS)
        if failure := self._failure_in(answers):
            return failure
        if not is_lost(error):
            return error
        return self._silence_in(answers) or RanksLostError(f"rank 0 {LOST}: {' '.join(str(error).split())[:200]}")

    def close(self) -> None:
        """End the other ranks."""
        for connection in self._connections.values():
            with suppress(OSError):
                connection.send_bytes(pickle.dumps(None))
            connection.close()


@dataclass(frozen=True)
class Subject:
    """An object that every rank has one of."""

    ranks: Ranks
    number: int

    @property
    def own(self) -> Any:
        """This rank's."""
        return self.ranks._subjects[self.number]

    def call(self, method: str, *args: Any, each: Sequence[Any] | None = None) -> list[Any]:
        """Call a method in every rank; returns the results, in the order of the ranks.

        Args:
            each: a first argument for each rank.
        """
        inputs: list[tuple[Any, Any]] = [(args, {})] * self.ranks.size
        if each is not None:
            inputs = [((one, *args), {}) for one in each]
        return self.ranks._order(self.number, method, inputs)


def carry_out(subjects: list[Any], subject: int | None, call: Any, args: Any, options: Any) -> Any:
    """An order, in one rank."""
    if subject is not None:
        return getattr(subjects[subject], call)(*args, **options)
    subjects.append(call(*args, **options))
    return None


def is_lost(error: BaseException) -> bool:
    """Whether an error is that another rank did not take part in something that ranks compute together."""
    import torch.distributed as dist

    kinds = tuple(
        getattr(dist, name) for name in ("DistError", "DistBackendError", "DistNetworkError") if hasattr(dist, name)
    )
    words = ("gloo", "NCCL", "Timed out waiting", "Connection closed by peer", "Broken pipe", "Connection reset")
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def obey(connection: Connection) -> bool:
    """Carry out rank 0's orders until it closes, or one fails: after that the ranks no longer agree.

    Returns:
        Whether rank 0 has closed in order.
    """
    subjects: list[Any] = []
    while True:
        try:
            order = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return False
        if order is None:
            return True
        try:
            answer = pickle.dumps(carry_out(subjects, *order))
        except BaseException as error:
            with suppress(OSError):
                connection.send_bytes(pickle.dumps(_report(error)))
            return False
        try:
            connection.send_bytes(answer)
        except OSError:
            return False


def _report(error: BaseException) -> Failed:
    text = " ".join(str(error).split())
    if is_lost(error):
        return Failed(f"{LOST} ({text[:200]})", lost=True)
    if isinstance(error, UserError | EngineFailedError):
        return Failed(text)
    traceback.print_exception(error, file=sys.stderr)  # a fault in the code
    return Failed(f"{type(error).__name__}: {text[:500]}")


@contextmanager
def leading(store: Store, size: int, seconds: float) -> Iterator[Ranks]:
    """Meet the other ranks.

    Raises:
        RanksLostError: if one does not come in time.
    """
    connections: dict[int, Connection] = {}
    with tempfile.TemporaryDirectory(prefix="skillsd-ranks-") as folder:
        with socket.socket(socket.AF_UNIX) as listener:
            path = str(Path(folder) / "orders")
            listener.bind(path)
            listener.listen(size)
            store.set("orders", path)
            deadline = time.monotonic() + seconds
            while len(connections) < size - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    accepted, _ = listener.accept()
                except TimeoutError:
                    missing = [rank for rank in range(1, size) if rank not in connections]
                    raise RanksLostError(f"{_named(missing)} has not started within {seconds:g} s") from None
                accepted.setblocking(True)
                connection = Connection(accepted.detach())
                connections[pickle.loads(connection.recv_bytes())] = connection
        ranks = Ranks(dict(sorted(connections.items())), seconds)
        try:
            yield ranks
        finally:
            ranks.close()


def following(store: Store, rank: int) -> bool:
    """Be one of the other ranks until rank 0 ends; returns whether it has closed in order."""
    with socket.socket(socket.AF_UNIX) as here:
        here.connect(store.get("orders").decode())
        connection = Connection(here.detach())
    connection.send_bytes(pickle.dumps(rank))
    return obey(connection)
