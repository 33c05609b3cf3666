"""Run a coroutine from synchronous code, also inside a running event loop such as a notebook's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to completion and return its result, or raise its exception.

    If an event loop is already running in this thread, `work` runs in a new loop in another thread while this one
    waits. An interrupt (Ctrl-C) then cancels `work`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    return _run_in_thread(work)


def _run_in_thread(work: Coroutine[Any, Any, T]) -> T:
    outcome: Future[T] = Future()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = []

    async def run() -> T:
        task = asyncio.ensure_future(work)
        running.append((asyncio.get_running_loop(), task))
        return await task

    def target() -> None:
        try:
            outcome.set_result(asyncio.run(run()))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=target, name="skillsd").start()
    try:
        # Not `Thread.join`: after an interrupt, Python 3.11 takes the thread for finished.
        return outcome.result()
    except BaseException:
        if not outcome.done():
            for loop, task in running:
                with suppress(RuntimeError):  # the loop is closed: the work has just ended
                    loop.call_soon_threadsafe(task.cancel)
            wait([outcome])
        raise
