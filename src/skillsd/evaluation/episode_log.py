"""Finished episodes of an evaluation, appended to a file as they end, so that an interrupted evaluation can resume."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from skillsd.errors import UserError
from skillsd.files.write import make_folder, writing
from skillsd.rollouts.records import trajectory_from_json, trajectory_to_json
from skillsd.types import Trajectory

FORMAT = 2
_BEGIN = f'{{"format": {FORMAT}, "settings": '.encode()
"""The first bytes of every episode log."""


class EpisodeLog:
    """JSON lines: first the settings, then the episodes, each with the calls and tokens spent so far.

    An incomplete last line, left by a crash, is dropped. A lock file next to it excludes other processes.

    Args:
        settings: everything that must be equal for episodes to be comparable.

    Attributes:
        spent: calls and tokens spent so far, by name.

    Raises:
        UserError: if the file is not an episode log, has episodes of other settings, or is in use by another process.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.spent: Counter[str] = Counter()
        self._episodes: dict[tuple[int | None, float], dict[int, Trajectory]] = {}
        settings = json.loads(json.dumps(settings, default=str))
        make_folder(path.parent)
        self._lock = FileLock(path.with_name(f"{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is using {str(path)!r}: wait for it, or give another file (--episodes)"
            ) from None
        try:
            whole = self._read(settings) if path.exists() else 0
            with writing(path):
                self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
                self._file.truncate(whole)
            if not whole:
                self._write({"format": FORMAT, "settings": settings})
        except BaseException:
            self._lock.release()
            raise

    def of(self, iteration: int | None, temperature: float) -> Mapping[int, Trajectory]:
        """Seed -> episode, for a checkpoint's iteration (None: a model) and a temperature."""
        return self._episodes.setdefault((iteration, temperature), {})

    def __len__(self) -> int:
        return sum(map(len, self._episodes.values()))

    def add(self, iteration: int | None, temperature: float, episode: Trajectory, spent: Mapping[str, int]) -> None:
        self._episodes.setdefault((iteration, temperature), {})[episode.seed] = episode
        self._write(
            {
                "iteration": iteration,
                "temperature": temperature,
                "episode": trajectory_to_json(episode),
                "spent": dict(spent),
            }
        )

    def close(self, spent: Mapping[str, int]) -> None:
        """Close the file.

        Args:
            spent: the total, including episodes without a result.
        """
        try:
            if self.spent != spent:
                self._write({"spent": dict(spent)})
        finally:
            with suppress(OSError):  # the rest of a write that has failed
                self._file.close()
            self._lock.release()

    def _write(self, record: Mapping[str, Any]) -> None:
        with writing(self.path):
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.spent = Counter(record.get("spent", {}))

    def _read(self, settings: Mapping[str, Any]) -> int:
        """Read the file; returns the length of its complete lines, in bytes."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        cut = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        try:
            if not lines:
                # An incomplete first line of our own is left by a crash; anything else is a user's file: keep it.
                if not (cut.startswith(_BEGIN) or _BEGIN.startswith(cut)):
                    raise ValueError("it does not start like an episode log")
                return 0
            head, *records = map(json.loads, lines)
            if head["format"] != FORMAT:
                raise ValueError(f"its format is {head['format']}, expected {FORMAT}")
            for record in records:
                self.spent = Counter(record.get("spent", {}))
                if "episode" in record:
                    episode = trajectory_from_json(record["episode"])
                    self._episodes.setdefault((record["iteration"], record["temperature"]), {})[episode.seed] = episode
            theirs = dict(head["settings"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{str(self.path)!r} is not an episode log ({error}): give another file or delete it"
            ) from error
        if difference := _first_difference(theirs, settings):
            key, before, now = difference
            raise UserError(
                f"{str(self.path)!r} has episodes of another evaluation: their {key} is {before!r}, here it is "
                f"{now!r}. Give another file (--episodes) or delete that one"
            )
        return sum(map(len, lines))


def _first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key, dotted, whose values differ, with both values."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            inner = f"{key}.{name}" if key else name
            if difference := _first_difference(before.get(name), now.get(name), inner):
                return difference
    return key, before, now
