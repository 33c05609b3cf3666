"""Rank 0 notices and names a rank that raises, ends or hangs. The other ranks are threads: no torch.distributed."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from skillsd.engines.torch.ranks import orders
from skillsd.engines.torch.ranks.orders import Ranks, Store, following, leading, obey
from skillsd.errors import EngineFailedError, RanksLostError, UserError

LEADER = threading.main_thread()
SOCKETS: dict[str, Connection] = {}
"""Of the other ranks."""


class Worker:
    """What each rank has; `fault` is what happens in the other ranks alone."""

    def double(self, number: int) -> int:
        return 2 * number

    def fail(self, error: Exception, everywhere: bool = False) -> str:
        if everywhere or threading.current_thread() is not LEADER:
            raise error
        return "done"

    def fail_alone(self, error: Exception) -> str:
        """At rank 0 only."""
        if threading.current_thread() is LEADER:
            raise error
        return "done"

    def fail_both(self, own: Exception, theirs: Exception) -> None:
        raise own if threading.current_thread() is LEADER else theirs

    def hang(self, seconds: float) -> None:
        if threading.current_thread() is not LEADER:
            time.sleep(seconds)

    def hang_and_lose(self, seconds: float) -> None:
        """What ranks compute together fails at rank 0, after its deadline: rank 2 does not take part."""
        if threading.current_thread() is LEADER:
            raise RuntimeError("[gloo] Timed out waiting 1000ms for recv operation to complete")
        if threading.current_thread().name == "rank 2":
            time.sleep(seconds)
        raise RuntimeError("[gloo] Connection closed by peer")

    def vanish(self) -> None:
        """The socket closes, as that of a killed process does."""
        if threading.current_thread() is not LEADER:
            SOCKETS[threading.current_thread().name].close()


Made = Callable[..., Ranks]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """`ranks(count, seconds)`: this thread leads."""
    monkeypatch.setattr(orders, "GRACE_SECONDS", 0.3)
    threads: list[threading.Thread] = []

    def follow(connection: Connection) -> None:
        SOCKETS[threading.current_thread().name] = connection
        try:
            obey(connection)
        finally:
            connection.close()

    def make(count: int = 2, seconds: float = 10.0) -> Ranks:
        ends: dict[int, Any] = {}
        for rank in range(1, count):
            ends[rank], theirs = Pipe()
            threads.append(threading.Thread(target=follow, args=(theirs,), name=f"rank {rank}", daemon=True))
            threads[-1].start()
        return Ranks(ends, seconds)

    yield make
    for thread in threads:
        thread.join(5)


def test_every_rank_answers_with_its_part(ranks: Made) -> None:
    made = ranks(3)
    subject = made.make(Worker)
    assert subject.call("double", each=[1, 2, 3]) == [2, 4, 6]
    assert subject.call("double", 5) == [10, 10, 10]
    made.close()


def test_a_rank_that_raises_ends_the_run_with_its_reason(ranks: Made, capfd: pytest.CaptureFixture[str]) -> None:
    made = ranks(3)
    subject = made.make(Worker)
    with pytest.raises(EngineFailedError, match="rank 1 failed: KeyError: 'weights'") as raised:
        subject.call("fail", KeyError("weights"))
    assert not isinstance(raised.value, RanksLostError)  # another start would fail as well
    assert "Traceback" in capfd.readouterr().err  # a fault in the code
    with pytest.raises(EngineFailedError, match="rank 1 failed"):  # the ranks no longer agree
        subject.call("double", 1)
    made.close()


def test_a_rank_that_has_failed_carries_out_no_more_orders(ranks: Made) -> None:
    """It ends, also if rank 0 does not: the ranks no longer agree."""
    made = ranks()
    subject = made.make(Worker)
    [thread] = [t for t in threading.enumerate() if t.name == "rank 1" and t.is_alive()]
    with pytest.raises(EngineFailedError, match="rank 1 failed"):
        subject.call("fail", EngineFailedError("out of memory"))
    thread.join(5)
    assert not thread.is_alive()
    made.close()


def test_an_explained_failure_has_no_traceback(ranks: Made, capfd: pytest.CaptureFixture[str]) -> None:
    made = ranks()
    with pytest.raises(EngineFailedError, match=r"rank 1 failed: out of memory\. Lower it"):
        made.make(Worker).call("fail", EngineFailedError("out of memory. Lower it"))
    assert capfd.readouterr().err == ""
    made.close()


def test_what_all_ranks_refuse_alike_is_rank_0s_error(ranks: Made) -> None:
    made = ranks()
    with pytest.raises(UserError, match=r"^no such model$"):
        made.make(Worker).call("fail", UserError("no such model"), True)
    made.close()


def test_rank_0s_own_error_is_its_own(ranks: Made) -> None:
    made = ranks()
    with pytest.raises(OSError, match="disk full"):
        made.make(Worker).call("fail_alone", OSError("disk full"))
    made.close()


def test_a_rank_that_ends(ranks: Made) -> None:
    made = ranks(3)
    subject = made.make(Worker)
    begin = time.monotonic()
    with pytest.raises(RanksLostError, match=r"ranks? 1.* ended without a reason"):
        subject.call("vanish")
    assert time.monotonic() - begin < 5  # at once, not after the deadline
    made.close()


def test_a_rank_that_ended_between_two_orders(ranks: Made) -> None:
    made = ranks()
    subject = made.make(Worker)
    thread = next(t for t in threading.enumerate() if t.name == "rank 1")
    made._connections[1].send_bytes(pickle.dumps(None))  # it ends
    thread.join(5)
    with pytest.raises(RanksLostError, match="rank 1 ended"):
        subject.call("double", 1)


def test_a_rank_that_hangs_is_named_within_the_deadline(ranks: Made) -> None:
    made = ranks(3, seconds=0.5)
    subject = made.make(Worker)
    begin = time.monotonic()
    with pytest.raises(RanksLostError, match=r"ranks 1, 2 gave no answer within 0.5 s \(engine.rank_seconds\)"):
        subject.call("hang", 2.0)
    assert time.monotonic() - begin < 1.5
    made.close()


def test_the_rank_that_the_others_waited_for_is_named(ranks: Made) -> None:
    """Rank 0 and rank 1 fail in what they compute together; rank 2 is the one that hangs."""
    made = ranks(3, seconds=1.0)
    with pytest.raises(RanksLostError, match=r"^rank 2 gave no answer"):
        made.make(Worker).call("hang_and_lose", 2.0)
    made.close()


def test_a_reason_comes_before_its_consequences(ranks: Made, capfd: pytest.CaptureFixture[str]) -> None:
    made = ranks()
    broken = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]")
    with pytest.raises(EngineFailedError, match=r"^rank 1 failed: MemoryError: no room"):
        made.make(Worker).call("fail_both", broken, MemoryError("no room"))
    made.close()


def test_a_rank_that_does_not_start_is_named() -> None:
    with pytest.raises(RanksLostError, match=r"rank 1 has not started within 0.1 s"), leading(Book(), 2, 0.1):
        pass


def test_ranks_meet_by_the_store() -> None:
    book = Book()
    closed: list[bool] = []
    thread = threading.Thread(target=lambda: closed.append(following(book, 1)), name="rank 1")
    thread.start()
    with leading(book, 2, 10.0) as made:
        assert made.make(Worker).call("double", each=[1, 2]) == [2, 4]
    thread.join(5)
    assert closed == [True]


class Book(Store):
    """A store within a process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._set = threading.Event()

    def set(self, key: str, value: str, /) -> None:
        self._values[key] = value
        self._set.set()

    def get(self, key: str, /) -> bytes:
        assert self._set.wait(10)
        return self._values[key].encode()
