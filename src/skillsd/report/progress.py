"""Progress of long jobs: bars with the remaining time in a terminal, plain lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 10.0
"""Minimum seconds between lines without a terminal."""


class Bars:
    """Progress bars of several jobs. Calling `update` often is cheap."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, object] = {}
        self._begun: dict[str, tuple[float, float]] = {}  # name -> (time, amount) of the first update
        self._printed: dict[str, float] = {}  # name -> time of its last line; inf after its end

    def update(self, name: str, done: float, total: float, note: str = "") -> None:
        """Set the progress of `name` to `done` of `total`; `note` is shown next to it."""
        now = time.monotonic()
        begun, start = self._begun.setdefault(name, (now, done))
        if self._console.is_terminal:
            if name not in self._tasks:
                # Begin at `done`, so that the work of an earlier process does not count as speed.
                self._tasks[name] = self._progress.add_task(name, total=total, completed=int(done), note=note)
            self._progress.update(self._tasks[name], completed=done, total=total, note=note)  # type: ignore[arg-type]
            return
        printed = self._printed.get(name, -LOG_SECONDS)
        if printed == math.inf or (done < total and now - printed < LOG_SECONDS):
            return
        self._printed[name] = now if done < total else math.inf
        rate = (done - start) / (now - begun) if now > begun else 0.0
        left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
        self._console.print(f"{name}: {int(done)}/{int(total)} {note}{left}", highlight=False)

    def drop(self, name: str) -> None:
        """Remove the bar of `name`."""
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))  # type: ignore[arg-type]

    def print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    @contextmanager
    def shown(self) -> Iterator[Bars]:
        with self._progress:
            yield self


def duration(seconds: float) -> str:
    """Seconds in words: ``59 min 59 s``, ``47 h 59 min``, ``1,999 days``, ``12 years``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    days = round(seconds / 86400)
    return f"{days:,} days" if days < 2000 else f"{round(days / 365):,} years"


def training_note(record: Mapping[str, object], symptoms: Sequence[str] = ()) -> str:
    """An iteration's record in a few words.

    Args:
        symptoms: see `skillsd.training.health`.
    """
    accuracy, seconds = record.get("rollout/accuracy"), record.get("time/iteration")
    parts = []
    if isinstance(accuracy, float):
        parts.append(f"train accuracy {accuracy:.0%}")
    parts += symptoms
    if isinstance(seconds, float):
        parts.append(f"{seconds:.1f} s/it")
    return ", ".join(parts)


def summaries_note(record: Mapping[str, Any]) -> str | None:
    """Calls, tokens and cost of summaries by a language model, from an iteration's record; None if there were none."""
    calls = record.get("summaries/calls")
    if calls is None:
        return None
    tokens = [record.get(f"summaries/tokens_{way}", 0) for way in ("in", "out")]
    cost = record.get("summaries/cost")
    spent = "" if cost is None else f", cost {cost:,.4f}"
    return f"summaries: {calls:,} calls, {tokens[0]:,} tokens in, {tokens[1]:,} out{spent}"
