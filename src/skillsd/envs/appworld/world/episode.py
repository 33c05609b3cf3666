"""Plays each episode in its own process.

AppWorld keeps one world per process and freezes the process's clock, so a process plays only one episode. Importing
AppWorld takes seconds: ``preload`` does it once, and every episode is a fork of that process.
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
    """Import everything that an episode needs. Call it once, after setting APPWORLD_ROOT and before ``fork_each``."""
    from appworld.api_docs import prepare_api_docs
    from appworld.apps import get_all_apps
    from appworld.collections.api_docs import ApiDocCollection
    from appworld.common.utils import import_apis_module, import_models_module
    from appworld.environment import AppWorld

    assert AppWorld
    for app in get_all_apps():
        import_models_module(app)
        import_apis_module(app)
    # The cache key is the arguments as passed, so they must be passed exactly as the engine does.
    ApiDocCollection.load(load_apps=tuple(get_all_apps(skip_admin=True)), include_response_schemas=True)
    for app in get_all_apps():
        prepare_api_docs(app, include_private_apis=True)
    import pytest  # the engine imports it at the first failing test

    assert pytest


def play(task_id: str, blocks: list[str]) -> dict[str, Any]:
    """Run code blocks in a task's world. Returns their outputs and the engine's evaluation."""
    from appworld.environment import AppWorld

    world = AppWorld(task_id=task_id, experiment_name=f"episode-{os.getpid()}", timeout_seconds=None)
    outputs = [world.execute(block) for block in blocks]
    completed = world.task_completed()
    tests = world.evaluate(suppress_errors=True).to_dict()
    shutil.rmtree(world.base_output_directory)
    return {"outputs": outputs, "completed": completed, **tests}


def fork_each(jobs: list[tuple[Any, Callable[[], Any]]], workers: int) -> Iterator[tuple[Any, Any]]:
    """Run each job in a fork of this process, up to ``workers`` in parallel. Yields (key, result) pairs.

    A job that raises or crashes yields {"error": text} as the result.
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
        # Wait for the oldest job: reading its pipe to the end ensures that no child blocks forever on a full pipe.
        pid, (key, pipe) = next(iter(running.items()))
        with pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        del running[pid]
        yield key, json.loads(text) if text else {"error": "the process ended without a result"}


def _child(job: Callable[[], Any], writer: int) -> None:
    """Run the job and exit. Never returns, so that the child doesn't close the parent's files or flush its buffers."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        result = job()
    except BaseException:
        result = {"error": traceback.format_exc()}
    data = json.dumps(result).encode()
    while data:
        data = data[os.write(writer, data) :]
    os._exit(0)


class Clock:
    """Elapsed wall-clock seconds since its creation."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __str__(self) -> str:
        return f"{time.monotonic() - self.start:.0f} s"
