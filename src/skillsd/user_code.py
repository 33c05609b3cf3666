"""Faults in code that users bring (environments, summarisers, loss terms ...): where they are, and a log of them."""

from __future__ import annotations

import inspect
import logging
import os
import sysconfig
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

from skillsd.errors import EngineFailedError, UserError

log = logging.getLogger(__name__)

PACKAGE = str(Path(__file__).parent) + os.sep
MAX_CHARS = 300
"""Longer messages of exceptions are cut in notes and errors; the log has them in full."""
MAX_KINDS = 100
"""Kinds of faults that are logged in full."""

_LIBRARIES = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_brought: set[str] = set()


def brought_by_user(module: str) -> None:
    """Count the frames of a module's package as the user's code, even if it is installed among the libraries."""
    if (package := module.partition(".")[0]) != "skillsd":
        _brought.add(package)


def where(error: BaseException) -> str:
    """``file:line`` of the user's code that an exception came from; empty if it came from elsewhere.

    It is the innermost frame that was called from this package and belongs neither to it nor to a library.
    """
    error = _innermost(error)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_shown(error.filename)}:{error.lineno or 1}"
    found, called_from_here = "", False
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            called_from_here = True
        elif called_from_here and _is_users(frame):
            found = f"{_shown(file)}:{line}"
    return found


def describe(error: BaseException) -> str:
    """An exception on one line, with the user's file and line, if any: ``KeyError: 'x' (my_env.py:7)``."""
    error = _innermost(error)
    try:
        text = " ".join(str(error).split())
    except Exception:  # its own __str__ fails
        text = "(its text can't be shown)"
    text = printable(text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} ...")
    place = where(error)
    return type(error).__name__ + (f": {text}" if text else "") + (f" ({place})" if place else "")


def defined(function: object) -> str:
    """``file:line`` of a function's definition; empty if it is not known or not the user's."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)  # type: ignore[arg-type]
    if code is None or code.co_filename.startswith((PACKAGE, "<")):
        return ""
    return f"{_shown(code.co_filename)}:{code.co_firstlineno}"


def printable(text: str) -> str:
    """The text with lone surrogates, which no terminal or file takes, written as ``\\udXXX``."""
    return text.encode("utf-8", "backslashreplace").decode()


class FaultLog:
    """The faults of user code in one run: the first of each kind in full in a file, the others counted.

    A kind is the same call, type of exception, file and line.

    Args:
        path: the file, created at the first fault. None: no file.
        note: called with one line for each kind.
    """

    def __init__(self, path: Path | None, note: Callable[[str], None]) -> None:
        self.path, self._note = path, note
        self.counts: Counter[str] = Counter()

    def record(self, what: str, error: BaseException) -> None:
        """Record an exception; `what` names the call that raised it."""
        kind = f"{what}: {type(_innermost(error)).__name__} ({where(error)})"
        if self._is_new(kind):
            self._write(f"{what}\n{''.join(traceback.format_exception(error))}")
            self._say(f"{what} raised {describe(error)}")

    def mention(self, kind: str, text: str) -> None:
        """Record a fault without an exception, e.g. a wrong type."""
        if self._is_new(kind):
            self._write(f"{text}\n")
            self._say(text)

    def hint(self) -> str:
        """Where the traceback is, for an error that ends the run."""
        return "" if self.path is None else f". The traceback is in {self.path}"

    def close(self) -> None:
        """Write how often each kind occurred."""
        repeated = [f"{count} times: {kind}\n" for kind, count in self.counts.items() if count > 1]
        if repeated:
            self._write("".join(repeated))

    def _is_new(self, kind: str) -> bool:
        self.counts[kind] += 1
        return self.counts[kind] == 1 and len(self.counts) <= MAX_KINDS

    def _say(self, text: str) -> None:
        more = "further ones of this kind are only counted"
        if self.path is not None and len(self.counts) == 1:
            more = f"the traceback is in {self.path}; {more}"
        self._note(f"{text} ({more})")

    def _write(self, text: str) -> None:
        if self.path is None:
            log.debug(text)
            return
        with suppress(OSError):  # a full disk must not turn a counted fault into the end of the run
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"[{stamp}] {text}\n")


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turn an exception that came from the user's code into a `UserError` with its file and line, and record it.

    A bug of this package keeps its traceback.
    """
    try:
        yield
    except (UserError, EngineFailedError):
        raise
    except (Exception, SystemExit) as error:
        if not where(error) or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        record(what, error)
        raise UserError(f"{what} failed: {describe(error)}{_current.get().hint()}") from error


_default = FaultLog(None, log.warning)
_current: ContextVar[FaultLog] = ContextVar("fault_log", default=_default)


@contextmanager
def logged_in(faults: FaultLog) -> Iterator[None]:
    """Record faults in `faults`, also those of tasks that are started inside the block."""
    token = _current.set(faults)
    try:
        yield
    finally:
        _current.reset(token)
        faults.close()


def record(what: str, error: BaseException) -> None:
    """`FaultLog.record` of the current log; without one, a warning of the module's logger."""
    _current.get().record(what, error)


def mention(kind: str, text: str) -> None:
    """`FaultLog.mention` of the current log; without one, a warning of the module's logger."""
    _current.get().mention(kind, text)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _is_users(frame: FrameType) -> bool:
    if str(frame.f_globals.get("__name__", "")).partition(".")[0] in _brought:
        return True
    file = frame.f_code.co_filename
    return not file.startswith(("<frozen", *_LIBRARIES)) and "site-packages" not in file


def _shown(file: str) -> str:
    """A path for messages: relative if it is below the current folder."""
    try:
        path = Path(file)
        return str(path.relative_to(Path.cwd())) if path.is_absolute() else file
    except (OSError, ValueError):
        return file
