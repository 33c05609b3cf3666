"""One episode of AppWorld: the world, what its jail may ask of it, and the evaluation. Run by forkserver.py.

Three parties, and who trusts whom:

- the trainer sends requests over a Unix socket (one connection, one world, one process) and may kill this process;
- this process holds the databases, answers API calls and evaluates. It never runs the model's code;
- the jail (jails.py, jail.py, shell.py) runs the model's code. All it can do to this process is to send messages, and
  a message that is not understood costs the jail its life.
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

CALLS = 1000
"""API calls of a block; the engine's own limit, after which it refuses them all."""
ARGUMENTS = 64 << 10
"""Characters of a call's arguments, as JSON: the engine keeps them all in memory."""
_NOT_FOR_AGENTS = {"client", "show", "track"}
"""Arguments of the engine's own `request` that are no argument of any API."""
OUTPUT = 300_000
"""Characters of a block's output and error. The session keeps fewer, but what comes may not be the session's; and an
answer that is too long for the trainer is a broken world to it, whose episode is played again."""


class Episode:
    """What the trainer may ask of a world, a method a request."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._world: Any = None
        self._turn = 0

    def hello(self) -> dict[str, Any]:
        """Whom to kill."""
        return {"pid": os.getpid()}

    def open(self, task_id: str) -> dict[str, Any]:
        from appworld import AppWorld

        self._jail = Jail(self._options)
        self._jail.start()  # comes up while the world opens
        self._world = world = AppWorld(
            task_id=task_id,
            experiment_name=outputs(self._options, os.getpid()),  # one a rollout: others would overwrite it
            timeout_seconds=None,  # by SIGALRM, which a loop can swallow; the deadlines are ours
            load_ground_truth=False,  # the evaluation reads it for itself
        )
        apis = {app: sorted(names) for app, names in world.apis.items()}
        self._hello = {"apis": apis, "datetime": world.task.datetime.isoformat()}
        self._jail.greet(self._hello)
        return {"apps": sorted(apis), "held": self._jail.held}

    def execute(self, code: str, seconds: float) -> dict[str, Any]:
        """Run `code` in the model's session for at most `seconds` of wall-clock time."""
        self._world.requester.reset_request_count()
        calls: list[dict[str, Any]] = []
        output: Any
        error: Any
        deadline = now() + seconds
        try:
            self._turn += 1  # so that an answer made up by the code is not followed by the true one a turn late
            self._jail.send({"code": code, "turn": self._turn}, deadline)
            while "call" in (message := self._jail.receive(deadline)):
                self._jail.send(self._answer(message["call"], calls), deadline)
            output, error, lost = message.get("output"), message.get("error"), message.get("lost", 0)
            usable = isinstance(output, str) and isinstance(error, (str, type(None))) and isinstance(lost, int)
            if not usable or len(output) + len(error or "") > OUTPUT or message.get("turn") != self._turn:
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
        if not completed and not self._jail.alive:  # one that can't be had is no fault of the model's
            self._jail.start()
            self._jail.greet(self._hello)
            output += "\nThe Python session was restarted: its variables are gone, the apps' state is kept."
        return {"output": output, "error": error, "calls": calls, "completed": completed}

    def _answer(self, call: Any, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """Do an API call for the jail. Whatever is wrong with it is told to the caller."""
        from appworld.requester import _get_api_name_to_doc

        try:
            app, name, arguments = call
            api = self._world.apis[app][name]
            doc = _get_api_name_to_doc(app, include_private_apis=True)[name]
            known = {parameter["name"] for parameter in doc["parameters"]}  # a made-up name could carry anything
            args = [key for key in arguments if key in known]
            changes = doc["method"].upper() != "GET" and name != "login"
            record = {"app": app, "api": name, "args": args, "ok": True, "error": None, "changes": changes}
        except Exception as error:
            raise JailBrokenError("the Python session asked for something that is no API") from error
        if len(calls) >= CALLS:
            return {"error": f"Maximum number of API calls ({CALLS}) reached."}
        calls.append(record)
        try:
            if len(json.dumps(arguments)) > ARGUMENTS:
                raise ValueError(f"the arguments of {app}.{name} are longer than {ARGUMENTS} characters")
            strange = sorted(key for key in arguments if key.startswith("_") or key in _NOT_FOR_AGENTS)
            if strange:
                raise TypeError(f"{app}.{name} has no parameter {strange[0]!r}")
            _refuse_other_paths(doc["path"], arguments)
            return {"result": api(**arguments)}
        except Exception as error:
            words = str(getattr(error, "detail", None) or error)
            record |= {"ok": False, "error": words[:500]}
            return {"error": words}

    def evaluate(self) -> dict[str, Any]:
        """Compare the databases with what the task asks for. `tests` counts what a no-op would fail."""
        from appworld.evaluator import evaluate_task

        world = self._world
        world._save_state(world.output_db_home_path_on_disk)
        try:
            tracker = evaluate_task(world.task_id, world.experiment_name, suppress_errors=True, save_report=False)
        except Exception as error:
            if not _raised_by_the_task(error):
                raise
            # The agent has left nothing that the task's tests could look at, its own account deleted, say.
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


def _refuse_other_paths(path: str, arguments: dict[str, Any]) -> None:
    """An argument that stands in the URL must not lead to another URL (``../../admin/...``)."""
    for key, value in arguments.items():
        if f"{{{key}}}" in path and re.search(r"[/\\?#%]|^\.+$", str(value)):
            raise Exception(f"Response status code is 422:\n{key} is not a valid value")


def _raised_by_the_task(error: BaseException) -> bool:
    """Whether an evaluation failed in the task's own tests, not in the engine that runs them."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(Path(frame.f_code.co_filename).name == "evaluation.py" for frame in frames)


def outputs(options: dict[str, Any], pid: int) -> str:
    """Where the engine keeps what the world of a process leaves; an absolute path, so not under the data."""
    return str(Path(options["socket"]).parent / f"outputs-{pid}")


def preload(root: Path) -> None:
    """Do, once and for all worlds, what each of them would do alike: every fork inherits it."""
    import freezegun
    import pytest  # noqa: F401 (the engine's, for the words of a failed test)
    from appworld import AppWorld, evaluator, requester  # noqa: F401
    from appworld.common.utils import import_apis_module, import_models_module
    from appworld.task import Task
    from IPython.terminal.embed import InteractiveShellEmbed  # noqa: F401

    some = next(path.name for path in sorted((root / "data" / "tasks").iterdir()) if path.is_dir())
    task = Task.load(task_id=some, load_ground_truth=False)  # the API documents, which the engine remembers
    apps = tuple(sorted({*task.allowed_apps, "admin", "supervisor"}))
    for app in apps:
        import_models_module(app)
        import_apis_module(app)
        requester._get_api_name_to_doc(app, include_private_apis=True)  # a tenth of a second an app; remembered
    requester.build_main_app = functools.cache(requester.build_main_app)
    requester.build_main_app(apps)
    with freezegun.freeze_time("2023-05-18"):  # it looks through all modules, and remembers what it found
        pass
    gc.collect()
    gc.freeze()  # a collection would write to every page that the forks share


def serve(connection: socket.socket, options: dict[str, Any]) -> None:
    """Answer requests, JSON a line each, until the trainer hangs up."""
    os.setsid()  # so that everything of this episode can be killed at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    episode = Episode(options)
    wire: BinaryIO = connection.makefile("rwb")  # type: ignore[assignment]
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for line in wire:
            request = json.loads(line)
            try:
                answer = {"ok": getattr(episode, request.pop("op"))(**request)}
            except Exception as error:  # the engine's: the trainer starts over in a fresh world
                answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
            wire.write(json.dumps(answer).encode() + b"\n")
            wire.flush()
    episode.close()
