"""Reads level files in the XSB format, in which collections of Sokoban levels are published.

A file has any number of levels. A level is a block of rows, and a row begins with a wall (``#``), possibly after floor.
Every other line ends a level and is otherwise ignored: blank lines, comments (``; 1``), titles, ``Author: ...``. Rows
may be run-length encoded (``4#|#@$.#|4#``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from skillsd.envs.sokoban.board import SYMBOLS, Level
from skillsd.errors import UserError

MAX_SIDE = 100
"""Maximum height and width of a level. The largest published levels have about half of it."""

_ROW = re.compile(r"[\d \-_]*#")
_RUN = re.compile(rf"(\d{{1,3}})([{re.escape(SYMBOLS)}])")


@dataclass(frozen=True)
class FileLevel:
    """A level, cropped (see `Level.cropped`), and its place: ``FILE:LINE`` of its first row."""

    level: Level
    place: str


def read_levels(path: Path) -> list[FileLevel]:
    """The levels of a file, in order.

    Raises:
        UserError: if the file can't be read or has no level, or a level is invalid, open, solved or a deadlock; with
            the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")  # only comments can have other characters
    except OSError as error:
        raise UserError(f"can't read the level file {str(path)!r}: {error.strerror or error}") from error
    levels: list[FileLevel] = []
    rows: list[str] = []
    place = ""
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if _ROW.match(line):
            place = place or f"{path}:{number}"
            rows += _rows(line.rstrip(), f"{path}:{number}")
        elif rows:
            levels.append(FileLevel(_level(rows, place), place))
            rows, place = [], ""
    if not levels:
        raise UserError(f"{str(path)!r} has no level: expected rows such as #@$.# in the XSB format")
    return levels


def _rows(line: str, place: str) -> list[str]:
    """The rows in a line: more than one only if it is run-length encoded."""
    rows = [_RUN.sub(lambda run: int(run[1]) * run[2], part) for part in line.split("|")]
    for row in rows:
        if wrong := row.lstrip(SYMBOLS)[:1]:
            raise UserError(
                f"{place}: {wrong!r} is not a symbol of a level: expected one of {SYMBOLS!r}. Comments start with ';'"
            )
        if len(row) > MAX_SIDE:
            raise UserError(f"{place}: the row has {len(row)} cells; expected at most {MAX_SIDE}")
    return rows


def _level(rows: list[str], place: str) -> Level:
    if len(rows) > MAX_SIDE:
        raise UserError(f"{place}: the level has {len(rows)} rows; expected at most {MAX_SIDE}")
    try:
        level = Level.from_rows(rows)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    for cell in sorted(level.reach()):
        row, column = divmod(cell, level.width)
        if row in (0, level.height - 1) or column in (0, level.width - 1):
            raise UserError(
                f"{place}: the level is open: the player can leave it in row {row + 1}, column {column + 1}"
            )
    if level.is_solved(level.start):
        raise UserError(f"{place}: the level is solved at the start: every box is on a target")
    if level.is_dead(level.start):
        raise UserError(f"{place}: the level can't be solved: a box can never reach a target")
    return level.cropped()
