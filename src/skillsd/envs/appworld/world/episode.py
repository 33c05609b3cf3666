"""One episode in a process of its own.

AppWorld keeps one world per process and freezes that process's clock, so nothing is played twice in one. Importing it
costs seconds; ``preload`` pays them once and every episode is then a fork of the process that did.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any


def preload() -> None:
    """Imports everything that an episode needs. Call it once, after APPWORLD_ROOT is set and before ``fork_each``."""
    from appworld.api_docs import prepare_api_docs
    from appworld.apps import get_all_apps
    from appworld.collections.api_docs import ApiDocCollection
    from appworld.common.utils import import_apis_module, import_models_module
    from appworld.environment import AppWorld

    assert AppWorld
    for app in get_all_apps():
        import_models_module(app)
        import_apis_module(app)
    # It is cached by its arguments as they are written, so they are written as the engine does.
    ApiDocCollection.load(load_apps=tuple(get_all_apps(skip_admin=True)), include_response_schemas=True)
    for app in get_all_apps():
        prepare_api_docs(app, include_private_apis=True)
    import pytest  # the engine imports it at the first failing test

    assert pytest


def play(task_id: str, blocks: list[str]) -> dict[str, Any]:
    """Runs code blocks in one task's world; returns what they printed and how the engine judges the result."""
    from appworld.environment import AppWorld

    world = AppWorld(task_id=task_id, experiment_name=f"episode-{os.getpid()}", timeout_seconds=None)
    outputs = [world.execute(block) for block in blocks]
    completed = world.task_completed()
    tests = world.evaluate(suppress_errors=True).to_dict()
    shutil.rmtree(world.base_output_directory)
    return {"outputs": outputs, "completed": completed, **tests}


def fork_each(jobs: list[tuple[Any, Callable[[], Any]]], workers: int) -> Iterator[tuple[Any, Any]]:
    """Runs each job in a fork of this process, ``workers`` at a time; yields (key, result) as they end.

    A job that raises or dies yields {"error": text}.
    """
    waiting, running = list(reversed(jobs)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            key, job = waiting.pop()
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                _child(job, writer)
            os.close(writer)
            running[pid] = (key, os.fdopen(reader))
        # The oldest first: its pipe is read to the end, so a child never blocks on a full one for ever.
        pid, (key, pipe) = next(iter(running.items()))
        with pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        del running[pid]
        yield key, json.loads(text) if text else {"error": "the process died without a word"}


def _child(job: Callable[[], Any], writer: int) -> None:
    """Never returns: the parent's open files and buffers are not the child's to close."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        result = job()
    except BaseException:
        result = {"error": traceback.format_exc()}
    data = json.dumps(result).encode()
    while data:
        data = data[os.write(writer, data) :]
    os._exit(0)


class Clock:
    """Seconds of real time since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __str__(self) -> str:
        return f"{time.monotonic() - self.start:.0f} s"
