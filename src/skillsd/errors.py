"""Errors with a one-line message for the user: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave. The command line prints its message and no traceback."""


class EngineFailedError(RuntimeError):
    """What an engine runs on failed: a worker process, a server, a device. The command line prints its message."""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names) if names else "(none)"
    return UserError(f"unknown {kind} {given!r}.{hint} Known: {listed}")
