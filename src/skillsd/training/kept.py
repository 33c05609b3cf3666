"""Finished episodes of an evaluation, kept in a file as they end, so that a later try goes on from there."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skillsd.errors import UserError
from skillsd.records import trajectory_from_json, trajectory_to_json
from skillsd.types import Trajectory

FORMAT = 1


class KeptEpisodes:
    """JSON lines: the settings first, then the episodes, each with what had been spent by then.

    A file that a crash cut short loses its last line.

    Args:
        settings: whatever makes episodes comparable or not; JSON-able.

    Raises:
        UserError: if the file holds something else, or episodes of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.spent: Counter[str] = Counter()
        self._kept: dict[tuple[int | None, float], dict[int, Trajectory]] = {}
        whole = self._read(json.loads(json.dumps(settings))) if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        self._file.truncate(whole)
        if not whole:
            self._write({"format": FORMAT, "settings": settings})

    def of(self, iteration: int | None, temperature: float) -> Mapping[int, Trajectory]:
        """The episodes of a checkpoint at a temperature, by their seeds."""
        return self._kept.setdefault((iteration, temperature), {})

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def add(self, iteration: int | None, temperature: float, episode: Trajectory, spent: Mapping[str, int]) -> None:
        self._kept.setdefault((iteration, temperature), {})[episode.seed] = episode
        self._write(
            {
                "iteration": iteration,
                "temperature": temperature,
                "episode": trajectory_to_json(episode),
                "spent": dict(spent),
            }
        )

    def close(self, spent: Mapping[str, int]) -> None:
        """`spent`: in all, episodes that came to nothing included."""
        if self.spent != spent:
            self._write({"spent": dict(spent)})
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.spent = Counter(record.get("spent", {}))

    def _read(self, settings: Mapping[str, Any]) -> int:
        """Bytes of the file that are whole lines."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if not lines:
            return 0
        try:
            head, *records = map(json.loads, lines)
            if head["format"] != FORMAT:
                raise ValueError(f"its format is {head['format']}, expected {FORMAT}")
            for record in records:
                self.spent = Counter(record.get("spent", {}))
                if "episode" in record:
                    episode = trajectory_from_json(record["episode"])
                    self._kept.setdefault((record["iteration"], record["temperature"]), {})[episode.seed] = episode
            theirs = dict(head["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(self.path)!r} is no file of kept episodes ({error}): give another one or delete it"
            ) from error
        for key in sorted(settings.keys() | theirs.keys()):
            if settings.get(key) != theirs.get(key):
                raise UserError(
                    f"{str(self.path)!r} holds episodes of another evaluation: their {key} is {theirs.get(key)!r}, "
                    f"here it is {settings.get(key)!r}. Give another file (--episodes) or delete that one"
                )
        return sum(map(len, lines))
