"""Running coroutines from synchronous code."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from skillsd.runs.sync import run_blocking


def outside(call: Callable[[], Any]) -> Any:
    return call()


def inside(call: Callable[[], Any]) -> Any:
    """Call it inside a running event loop, like a cell of a notebook."""

    async def cell() -> Any:
        return call()

    return asyncio.run(cell())


@pytest.fixture(params=[outside, inside])
def where(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], Any]:
    return request.param


async def double(value: int) -> int:
    await asyncio.sleep(0)
    return 2 * value


async def fail(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


def test_result_is_returned(where: Callable[..., Any]) -> None:
    assert where(lambda: run_blocking(double(4))) == 8


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit(3), ExceptionGroup("several", [OSError("disk")])])
def test_errors_propagate(where: Callable[..., Any], error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        where(lambda: run_blocking(fail(error)))
    assert raised.value is error


def test_calls_can_be_nested(where: Callable[..., Any]) -> None:
    async def outer() -> int:
        return run_blocking(double(1)) + run_blocking(double(2))

    assert where(lambda: run_blocking(outer())) == 6


def test_outside_a_loop_it_stays_in_this_thread() -> None:
    async def thread() -> int:
        return threading.get_ident()

    assert run_blocking(thread()) == threading.get_ident()
    assert inside(lambda: run_blocking(thread())) != threading.get_ident()


def test_outer_loop_continues_afterwards() -> None:
    async def cell() -> list[int]:
        return [run_blocking(double(1)), await double(2)]

    assert asyncio.run(cell()) == [2, 4]


def test_interrupt_cancels_the_work_in_the_other_thread() -> None:
    ended: list[str] = []

    async def work() -> None:
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT]).start()  # as Ctrl-C: to the process
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    async def cell() -> None:
        previous = signal.signal(signal.SIGINT, interrupt)  # asyncio.run's handler would only cancel this coroutine
        try:
            run_blocking(work())
        finally:
            signal.signal(signal.SIGINT, previous)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(cell())
    assert time.monotonic() - begin < 10
    assert ended == ["cancelled"]
