"""The model's Python session. Runs inside the jail (jail.py), so it contains nothing that needs protection.

It produces the same output text as AppWorld's own `execute`, for printed values, errors and empty output, so that an
agent can't tell the two apart; a test compares them. API calls are messages to world.py.

The output text is what the model reads: results depend on its exact wording.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import linecache
import random
import re
import socket
import sys
import textwrap
import time
import traceback
import types
from typing import Any

FILE = "<python-input>"
MAX_OUTPUT_CHARS = 200_000
"""Output beyond this is counted but discarded."""

PREAMBLE = """
import builtins
import calendar
import datetime
import itertools
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from copy import deepcopy
from functools import reduce

from pendulum import MONDAY, TUESDAY, WEDNESDAY, THURSDAY, FRIDAY, SATURDAY, SUNDAY

from appworld.common.datetime import pendulum
from appworld.common.datetime import VanillaDate as Date
from appworld.common.datetime import VanillaDateTime as DateTime
from appworld.common.datetime import VanillaTime as Time
"""


def prepare(modules: dict[str, str]) -> None:
    """Import what a session needs. `modules`: name -> source of the parts of ``appworld.common`` that it gets."""
    from freezegun import freeze_time

    for name in ("appworld", "appworld.common"):
        sys.modules[name] = types.ModuleType(name)
    for name, source in modules.items():
        module = sys.modules[f"appworld.common.{name}"] = types.ModuleType(f"appworld.common.{name}")
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    exec(PREAMBLE, {})
    with freeze_time("2023-05-18"):  # fills freezegun's cache of the loaded modules
        pass


class _Output(io.TextIOBase):
    """Standard output with a size limit, so that large outputs don't fill the memory."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.size < MAX_OUTPUT_CHARS:
            self.parts.append(text[: MAX_OUTPUT_CHARS - self.size])
        self.size += len(text)
        return len(text)

    def text(self) -> str:
        return "".join(self.parts)


class _Wire:
    """Messages: JSON, one per line."""

    def __init__(self, channel: socket.socket) -> None:
        self._file = channel.makefile("rwb")

    def send(self, message: dict[str, Any]) -> None:
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()

    def receive(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise SystemExit(0)  # the world is gone
        return json.loads(line)


class _Names(dict):
    """The type of `apis` and `apis.spotify`: names accessible as attributes or items."""

    def __init__(self, complaint: str, items: dict[str, Any]) -> None:
        super().__init__(items)
        self.__dict__["_complaint"] = complaint

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise Exception(self._complaint.format(name)) from None


def _plain(value: Any) -> Any:
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _api(wire: _Wire, app: str, name: str) -> Any:
    def call(**arguments: Any) -> Any:
        # Converted to JSON here, so that arguments that can't be sent raise in the caller's code.
        wire.send({"call": [app, name, json.loads(json.dumps(arguments, default=_plain))]})
        answer = wire.receive()
        if "error" in answer:
            raise Exception(answer["error"])
        return answer["result"]

    call.__name__ = name
    return call


def _show(*values: Any, **options: Any) -> None:
    """AppWorld's `print`: a single list, tuple or dictionary is printed as JSON."""
    if not options and len(values) == 1 and isinstance(values[0], (list, tuple, dict)):
        indent = 1 if len(json.dumps(values[0])) >= 100 else None
        builtins.print(json.dumps(values[0], indent=indent))
    else:
        builtins.print(*values, **options)


def _no_input(*_: Any, **__: Any) -> None:
    raise Exception("input(..) is not allowed. All decisions must be made autonomously.")


def _no_sleep(*_: Any) -> None:
    pass


class Session:
    """A namespace that persists between turns."""

    def __init__(self, wire: _Wire, apis: dict[str, list[str]]) -> None:
        names = {
            app: _Names(f"No API named '{{}}' found in the {app} app.", {api: _api(wire, app, api) for api in listed})
            for app, listed in apis.items()
        }
        self._space: dict[str, Any] = {"__name__": "__main__"}
        exec(PREAMBLE, self._space)
        self._space |= {"apis": _Names("No app named '{}' found.", names), "print": _show, "input": _no_input}
        self._space["requester"] = None  # a parameter of official solutions, which rarely use it
        random.seed(100)  # AppWorld's seed; with a fixed hash seed, episodes are deterministic
        time.sleep = _no_sleep  # the clock is frozen

    def run(self, code: str) -> dict[str, Any]:
        """Run code. Returns the ``output`` for the agent and the last line of the ``error``, or None."""
        code = code.strip()
        if not code:
            return {"output": "No code available to execute.", "error": None}
        try:
            tree = ast.parse(code)
            program = compile(tree, FILE, "exec")
        except SyntaxError as error:
            line = (error.text or "").rstrip()
            return _failure(f"Syntax error in line:\n{line}\nMessage: {error.msg}", f"SyntaxError: {error.msg}")
        except (ValueError, RecursionError, MemoryError) as error:
            return _failure(f"{type(error).__name__}: {error}", f"{type(error).__name__}: {error}")
        linecache.cache[FILE] = (len(code), None, f"{code}\n".splitlines(keepends=True), FILE)
        output, streams = _Output(), (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = output, _Output()
        try:
            exec(program, self._space)
        except BaseException as error:  # anything the code raises, including SystemExit and KeyboardInterrupt
            return _failure(_traceback(error), traceback.format_exception_only(error)[-1].strip())
        finally:
            sys.stdout, sys.stderr = streams
        text = output.text()
        answer = {"output": text if text.strip() else "Execution successful.", "error": None}
        return answer | ({"lost": output.size - len(text)} if output.size > len(text) else {})


def _failure(text: str, error: str) -> dict[str, Any]:
    return {"output": ("Execution failed. Traceback:\n" + text)[:MAX_OUTPUT_CHARS], "error": error[:1000]}


def _traceback(error: BaseException) -> str:
    """The traceback, reduced to the frames of the model's code."""
    try:
        lines = "".join(traceback.TracebackException.from_exception(error).format()).splitlines()
    except BaseException:  # an exception class of the model's that can't be printed
        return type(error).__name__
    kept, own = [], False
    for line in lines:
        if not line.startswith("  "):
            kept.append(line)
            continue
        if match := re.match(r' +File "(.*?)", line \d+', line):
            own = match[1] == FILE
        if own:
            kept.append(line)
    first = next((number for number, line in enumerate(kept) if FILE in line), 0)
    return textwrap.dedent("\n".join(kept[first:]))


def serve(channel: socket.socket, protections: list[str]) -> None:
    """Run the code that the world sends, until it closes the connection."""
    from freezegun import freeze_time

    wire = _Wire(channel)
    wire.send({"protections": protections})
    start = wire.receive()
    session = Session(wire, start["apis"])
    with freeze_time(start["datetime"]):
        while True:
            request = wire.receive()
            wire.send(session.run(request["code"]) | {"turn": request["turn"]})
