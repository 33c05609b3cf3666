"""The Python session that the model acts in. Runs inside jail.py, and trusts nobody to be there but the model's code.

It answers as AppWorld's own `execute` does (the same words for what was printed, for errors, for nothing at all), so
that an agent can't tell the two apart; tests compare them. The APIs are called by messages to world.py.
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
OUTPUT = 200_000
"""Characters of output that are kept; more are counted."""

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
    """Import what a session needs; `modules` are sources of ``appworld.common``, the rest of which is not here."""
    from freezegun import freeze_time

    for name in ("appworld", "appworld.common"):
        sys.modules[name] = types.ModuleType(name)
    for name, source in modules.items():
        module = sys.modules[f"appworld.common.{name}"] = types.ModuleType(f"appworld.common.{name}")
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    exec(PREAMBLE, {})
    with freeze_time("2023-05-18"):  # it looks through all modules, and remembers what it found
        pass


class _Output(io.TextIOBase):
    """Standard output that forgets what is beyond the limit, so that a flood fills no memory."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.size < OUTPUT:
            self.parts.append(text[: OUTPUT - self.size])
        self.size += len(text)
        return len(text)

    def text(self) -> str:
        return "".join(self.parts)


class _Wire:
    """Messages: JSON, one a line."""

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
    """What `apis` and `apis.spotify` are: names to be had as attributes or as items."""

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
        # Encoded once more below; this way what can't be sent is the caller's error.
        wire.send({"call": [app, name, json.loads(json.dumps(arguments, default=_plain))]})
        answer = wire.receive()
        if "error" in answer:
            raise Exception(answer["error"])
        return answer["result"]

    call.__name__ = name
    return call


def _show(*values: Any, **options: Any) -> None:
    """AppWorld's `print`: a lone list or dictionary is shown as JSON."""
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
    """A namespace that lasts from turn to turn."""

    def __init__(self, wire: _Wire, apis: dict[str, list[str]]) -> None:
        names = {
            app: _Names(f"No API named '{{}}' found in the {app} app.", {api: _api(wire, app, api) for api in listed})
            for app, listed in apis.items()
        }
        self._space: dict[str, Any] = {"__name__": "__main__"}
        exec(PREAMBLE, self._space)
        self._space |= {"apis": _Names("No app named '{}' found.", names), "print": _show, "input": _no_input}
        self._space["requester"] = None  # what official solutions are handed and rarely use
        random.seed(100)  # AppWorld's; with a fixed hash seed, an episode is the same whenever it is played
        time.sleep = _no_sleep  # time stands still here

    def run(self, code: str) -> dict[str, Any]:
        """What the agent is shown, and the last line of the error, if there was one."""
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
        except BaseException as error:  # whatever the code raises, exits and interrupts too, is an answer
            return _failure(_words(error), traceback.format_exception_only(error)[-1].strip())
        finally:
            sys.stdout, sys.stderr = streams
        text = output.text()
        answer = {"output": text if text.strip() else "Execution successful.", "error": None}
        return answer | ({"lost": output.size - len(text)} if output.size > len(text) else {})


def _failure(words: str, error: str) -> dict[str, Any]:
    return {"output": ("Execution failed. Traceback:\n" + words)[:OUTPUT], "error": error[:1000]}


def _words(error: BaseException) -> str:
    """The traceback without any frame but the model's own."""
    try:
        lines = "".join(traceback.TracebackException.from_exception(error).format()).splitlines()
    except BaseException:  # an exception of the model's own that can't be printed
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


def serve(channel: socket.socket, held: list[str]) -> None:
    """Run what the world sends until it hangs up."""
    from freezegun import freeze_time

    wire = _Wire(channel)
    wire.send({"held": held})
    start = wire.receive()
    session = Session(wire, start["apis"])
    with freeze_time(start["datetime"]):
        while True:
            request = wire.receive()
            wire.send(session.run(request["code"]) | {"turn": request["turn"]})
