"""Errors whose message is for the user: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Invalid input. The command line prints the message without a traceback."""


class EngineFailedError(RuntimeError):
    """A worker process, server or device of an engine failed. The command line prints no traceback."""


class SamplerLostError(EngineFailedError):
    """A sampler's process has ended or does not answer. Another sampler may answer the same request."""


class RanksLostError(EngineFailedError):
    """A rank has ended, or gave no answer in time. If the ranks are started again, training goes on from the last
    checkpoint."""

    EXIT_CODE = 75
    """Of the command line: the system's code for a temporary failure."""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UserError:
    """An error for an unknown name, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names) if names else "(none)"
    return UserError(f"unknown {kind} {given!r}.{hint} Known: {listed}")
