"""Deadlines of calls that share the event loop with other work, such as a decode pass that blocks it.

A deadline is measured in `SLICES`. While the loop is free, they add up to its seconds. If the loop was blocked, the
timer of a slice fires late, and the slice counts once. So a block costs a waiting call at most one slice, however long
it was.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

SLICES = 20
GRACE_TURNS = 3
"""Turns of the event loop between the last slice and the end, for results that are ready but not delivered yet."""

_abandoned: list[object] = []
"""Kept: Python complains when a coroutine that swallows its cancellation is garbage collected."""


class DeadlineMissedError(Exception):
    """A call took longer than its deadline."""


async def within(seconds: float, call: Awaitable[T]) -> T:
    """The result of `call`, which may take `seconds` of a free event loop.

    At the deadline it is cancelled. If it goes on for as long again, because it swallows the cancellation, it is
    abandoned.

    Raises:
        DeadlineMissedError: if it took longer, whatever it returned or raised in the end.
        BaseException: whatever else it raises.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    timer: asyncio.Handle
    given_up = False

    def start(then: Callable[[], None], left: int = SLICES) -> None:
        nonlocal timer
        if left > 0:
            timer = loop.call_later(seconds / SLICES, start, then, left - 1)
        elif left > -GRACE_TURNS:
            timer = loop.call_soon(start, then, left - 1)
        else:
            then()

    def cancel() -> None:
        deadline.reschedule(loop.time())
        start(abandon)

    def abandon() -> None:
        nonlocal given_up
        given_up = True
        assert task is not None
        task.cancel()

    deadline = asyncio.timeout(None)
    try:
        async with deadline:
            start(cancel)
            result = await _driven(call, lambda: given_up)
    except BaseException as error:
        if given_up:
            task.uncancel()
        # If the task itself is cancelled as well, that counts.
        if not deadline.expired() or (isinstance(error, asyncio.CancelledError) and task.cancelling()):
            raise
        raise DeadlineMissedError from error
    finally:
        timer.cancel()
    if deadline.expired():
        raise DeadlineMissedError
    return result


async def finished(work: asyncio.Future[Any], seconds: float) -> bool:
    """Wait for `work`, at most `seconds` of a free event loop. It is not cancelled."""
    for _ in range(SLICES):
        await asyncio.wait([work], timeout=seconds / SLICES)
        if work.done():
            return True
    return False


@types.coroutine
def _driven(call: Awaitable[T], given_up: Callable[[], bool]) -> Generator[Any, Any, T]:
    """Await `call`, and stop awaiting it once it is given up."""
    steps = call.__await__()
    proceed: Callable[[], Any] = partial(next, steps)
    while True:
        try:
            waiting_for = proceed()
        except StopIteration as end:
            result: T = end.value
            return result
        try:
            yield waiting_for
            proceed = partial(next, steps)
        except BaseException as error:
            if given_up():
                _abandoned.append(call)
                raise
            proceed = partial(steps.throw, error)
