"""Call the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    """What a command left: its exit code and output."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]
"""`skillsd("train", "sokoban-nano", ...)`."""


def assert_one_line(result: Result, *parts: str) -> None:
    """The command failed with a single error line that contains `parts`."""
    assert result.code == 2, result
    assert result.out == "" or "->" in result.out, result
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err, result.err
