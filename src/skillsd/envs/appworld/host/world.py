"""One episode of AppWorld: the world, the API calls of its jail, and the evaluation. Run by forkserver.py.

Three parties and their trust boundaries:

- the trainer sends requests over a Unix socket (one connection = one world = one process) and may kill this process;
- this process holds the databases, executes API calls and evaluates. It never runs the model's code;
- the jail (jails.py, jail.py, shell.py) runs the model's code. It can only send messages to this process, and an
  invalid message ends the jail.

Outputs and error texts in `execute` and `_answer` are what the model reads: results depend on their exact wording.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import re
import signal
import socket
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from jails import Jail, JailBrokenError, now

MAX_CALLS = 1000
"""API calls per code block: the engine's own limit, after which it rejects all calls."""
MAX_ARGUMENT_CHARS = 64 << 10
"""Length of a call's arguments as JSON. The engine keeps all of them in memory."""
_RESERVED_ARGUMENTS = {"client", "show", "track"}
"""Arguments of the engine's `request` method that are not arguments of any API."""
MAX_OUTPUT_CHARS = 300_000
"""Length of a block's output and error. The session has a lower limit, but the model's code may write to its socket;
and the trainer would treat an overlong response as an infrastructure failure and replay the episode."""


class Episode:
    """The trainer's requests to a world, one method each."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._world: Any = None
        self._turn = 0

    def hello(self) -> dict[str, Any]:
        """This process's id, for killing it."""
        return {"pid": os.getpid()}

    def open(self, task_id: str) -> dict[str, Any]:
        from appworld import AppWorld

        self._jail = Jail(self._options)
        self._jail.start()  # starts while the world opens
        self._world = world = AppWorld(
            task_id=task_id,
            experiment_name=outputs(self._options, os.getpid()),  # unique per episode
            timeout_seconds=None,  # ours instead: the engine uses SIGALRM, whose exception the code can catch
            load_ground_truth=False,  # the evaluation loads it itself
        )
        apis = {app: sorted(names) for app, names in world.apis.items()}
        self._hello = {"apis": apis, "datetime": world.task.datetime.isoformat()}
        self._jail.greet(self._hello)
        return {"apps": sorted(apis), "protections": self._jail.protections}

    def execute(self, code: str, seconds: float) -> dict[str, Any]:
        """Run `code` in the model's session for at most `seconds` of wall-clock time."""
        self._world.requester.reset_request_count()
        calls: list[dict[str, Any]] = []
        output: Any
        error: Any
        deadline = now() + seconds
        try:
            self._turn += 1  # detects forged results: the genuine one would arrive a turn late
            self._jail.send({"code": code, "turn": self._turn}, deadline)
            while "call" in (message := self._jail.receive(deadline)):
                self._jail.send(self._answer(message["call"], calls), deadline)
            output, error, lost = message.get("output"), message.get("error"), message.get("lost", 0)
            usable = isinstance(output, str) and isinstance(error, (str, type(None))) and isinstance(lost, int)
            if not usable or len(output) + len(error or "") > MAX_OUTPUT_CHARS or message.get("turn") != self._turn:
                raise JailBrokenError("the Python session sent something that is no message")
            if lost:
                output += f"\n[{lost} more characters were not kept]"
        except TimeoutError:
            self._jail.stop()
            error = f"TimeoutError: the code took longer than {seconds:g} seconds"
            output = f"Execution failed. Traceback:\nExecution timed out after {seconds:g} seconds."
        except JailBrokenError as broken:
            self._jail.stop()
            error = f"RuntimeError: {broken}"
            output = f"Execution failed. Traceback:\n{error}"
        completed = bool(self._world.task_completed())
        if not completed and not self._jail.alive:  # failing to start is an infrastructure failure
            self._jail.start()
            self._jail.greet(self._hello)
            output += "\nThe Python session was restarted: its variables are gone, the apps' state is kept."
        return {"output": output, "error": error, "calls": calls, "completed": completed}

    def _answer(self, call: Any, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """Execute an API call for the jail. Errors of the call are returned to the caller."""
        from appworld.requester import _get_api_name_to_doc

        try:
            app, name, arguments = call
            api = self._world.apis[app][name]
            doc = _get_api_name_to_doc(app, include_private_apis=True)[name]
            known = {
                parameter["name"] for parameter in doc["parameters"]
            }  # an invented name could carry arbitrary text
            args = [key for key in arguments if key in known]
            changes = doc["method"].upper() != "GET" and name != "login"
            record = {"app": app, "api": name, "args": args, "ok": True, "error": None, "changes": changes}
        except Exception as error:
            raise JailBrokenError("the Python session asked for something that is no API") from error
        if len(calls) >= MAX_CALLS:
            return {"error": f"Maximum number of API calls ({MAX_CALLS}) reached."}
        calls.append(record)
        try:
            if len(json.dumps(arguments)) > MAX_ARGUMENT_CHARS:
                raise ValueError(f"the arguments of {app}.{name} are longer than {MAX_ARGUMENT_CHARS} characters")
            reserved = sorted(key for key in arguments if key.startswith("_") or key in _RESERVED_ARGUMENTS)
            if reserved:
                raise TypeError(f"{app}.{name} has no parameter {reserved[0]!r}")
            _reject_path_traversal(doc["path"], arguments)
            return {"result": api(**arguments)}
        except Exception as error:
            text = str(getattr(error, "detail", None) or error)
            record |= {"ok": False, "error": text[:500]}
            return {"error": text}

    def evaluate(self) -> dict[str, Any]:
        """Run the task's tests on the databases. ``passes`` and ``failures`` are lists of [requirement, label]."""
        from appworld.evaluator import evaluate_task

        world = self._world
        world._save_state(world.output_db_home_path_on_disk)
        try:
            tracker = evaluate_task(world.task_id, world.experiment_name, suppress_errors=True, save_report=False)
        except Exception as error:
            if not _raised_by_the_task(error):
                raise
            # The agent deleted something that the task's tests access, such as its own account: a failure.
            return {"success": False, "passes": [], "failures": [[f"evaluation: {error}", "no_op_fail"]]}

        def texts(outcomes: list[Any]) -> list[list[str]]:
            return [[outcome["requirement"], outcome["label"]] for outcome in outcomes]

        return {
            "success": bool(tracker.success),
            "passes": texts(tracker.passes),
            "failures": texts(tracker.failures),
        }

    def close(self) -> None:
        if self._world is not None:
            self._jail.stop()


def _reject_path_traversal(path: str, arguments: dict[str, Any]) -> None:
    """Reject arguments in the URL's path that would lead to another URL (``../../admin/...``)."""
    for key, value in arguments.items():
        if f"{{{key}}}" in path and re.search(r"[/\\?#%]|^\.+$", str(value)):
            raise Exception(f"Response status code is 422:\n{key} is not a valid value")


def _raised_by_the_task(error: BaseException) -> bool:
    """Whether an exception comes from the task's own tests, not from the engine that runs them."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(Path(frame.f_code.co_filename).name == "evaluation.py" for frame in frames)


def outputs(options: dict[str, Any], pid: int) -> str:
    """The engine's output folder for a process's world. An absolute path, so that it is not in the data folder."""
    return str(Path(options["socket"]).parent / f"outputs-{pid}")


def preload(root: Path) -> None:
    """Do the work that all worlds share once; every fork inherits the result."""
    import freezegun
    import pytest  # noqa: F401 (the engine uses it to format failed tests)
    from appworld import AppWorld, evaluator, requester  # noqa: F401
    from appworld.common.utils import import_apis_module, import_models_module
    from appworld.task import Task
    from IPython.terminal.embed import InteractiveShellEmbed  # noqa: F401

    any_task = next(path.name for path in sorted((root / "data" / "tasks").iterdir()) if path.is_dir())
    task = Task.load(task_id=any_task, load_ground_truth=False)  # the API documents, which the engine caches
    apps = tuple(sorted({*task.allowed_apps, "admin", "supervisor"}))
    for app in apps:
        import_models_module(app)
        import_apis_module(app)
        requester._get_api_name_to_doc(app, include_private_apis=True)  # cached; takes 0.1 s per app
    requester.build_main_app = functools.cache(requester.build_main_app)
    requester.build_main_app(apps)
    with freezegun.freeze_time("2023-05-18"):  # fills freezegun's cache of the loaded modules
        pass
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, every shared page


def serve(connection: socket.socket, options: dict[str, Any]) -> None:
    """Serve requests (JSON, one per line) until the trainer closes the connection."""
    os.setsid()  # one process group per episode, so that all of it can be killed at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    episode = Episode(options)
    wire: BinaryIO = connection.makefile("rwb")  # type: ignore[assignment]
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for line in wire:
            request = json.loads(line)
            try:
                answer = {"ok": getattr(episode, request.pop("op"))(**request)}
            except Exception as error:  # a fault of the engine: the trainer retries in a new world
                answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
            wire.write(json.dumps(answer).encode() + b"\n")
            wire.flush()
    episode.close()
