"""Reading results and formatting numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@cache
def results(name: str) -> Any:
    """``docs/results/NAME.json``."""
    return _read(ROOT / "docs" / "results" / f"{name}.json")


@cache
def benchmark(name: str) -> Any:
    """``benchmarks/results/NAME.json``."""
    return _read(ROOT / "benchmarks" / "results" / f"{name}.json")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""

    def line(cells: Iterable[object]) -> str:
        return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """``24.5 [20.8, 28.2]``: in percent, without the sign."""
    return f"{100 * value:.1f}" + (f" {ends(interval)}" if interval else "")


def ends(interval: Sequence[float]) -> str:
    """``[20.8, 28.2]``: an interval in percent."""
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def points(mean: float, interval: Sequence[float] | None) -> str:
    """``+0.4 [-2.1, +2.9]``: a difference in percentage points."""
    text = f"{100 * mean:+.1f}"
    return f"{text} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]" if interval else text


def significant(value: float) -> str:
    """Two significant digits: ``0.038``, ``2.8e-6``."""
    return f"{value:#.2g}".replace("e-0", "e-")
