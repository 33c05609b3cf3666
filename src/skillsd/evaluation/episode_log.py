"""Finished episodes of an evaluation, appended to a file as they end, so that a later attempt resumes from there."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from skillsd.errors import UserError
from skillsd.rollouts.records import trajectory_from_json, trajectory_to_json
from skillsd.types import Trajectory

FORMAT = 1
_BEGIN = f'{{"format": {FORMAT}, "settings": '.encode()
"""The first bytes of every such file."""


class EpisodeLog:
    """JSON lines: the settings first, then the episodes, each with what had been spent by then.

    A file that a crash cut short loses its last line. A lock file beside it allows one process at a time.

    Args:
        settings: everything that decides whether episodes are comparable.

    Raises:
        UserError: if the file holds something else, or episodes of other settings, or another process uses it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.spent: Counter[str] = Counter()
        self._episodes: dict[tuple[int | None, float], dict[int, Trajectory]] = {}
        settings = json.loads(json.dumps(settings, default=str))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(f"{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is using {str(path)!r}: wait for it, or give another file (--episodes)"
            ) from None
        try:
            whole = self._read(settings) if path.exists() else 0
            self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
            self._file.truncate(whole)
            if not whole:
                self._write({"format": FORMAT, "settings": settings})
        except BaseException:
            self._lock.release()
            raise

    def of(self, iteration: int | None, temperature: float) -> Mapping[int, Trajectory]:
        """Seed -> episode, of a checkpoint (None: a model) at a temperature."""
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
        """`spent`: the total, including episodes without a result."""
        try:
            if self.spent != spent:
                self._write({"spent": dict(spent)})
            self._file.close()
        finally:
            self._lock.release()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.spent = Counter(record.get("spent", {}))

    def _read(self, settings: Mapping[str, Any]) -> int:
        """Read the file; returns its length in complete lines, in bytes."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        cut = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        try:
            if not lines:
                # Only our own first line may have been cut by a crash; any other file of one line is the user's.
                if not (cut.startswith(_BEGIN) or _BEGIN.startswith(cut)):
                    raise ValueError("it does not begin like an episode log")
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{str(self.path)!r} is not an episode log ({error}): give another file or delete it"
            ) from error
        for key in sorted(settings.keys() | theirs.keys()):
            if settings.get(key) != theirs.get(key):
                raise UserError(
                    f"{str(self.path)!r} holds episodes of another evaluation: their {key} is {theirs.get(key)!r}, "
                    f"here it is {settings.get(key)!r}. Give another file (--episodes) or delete that one"
                )
        return sum(map(len, lines))
