"""Numbers for JSON: few digits, and nothing that JSON does not have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

DIGITS = 4


def short(value: Any) -> Any:
    """A number with `DIGITS` significant digits; null for nan and infinities. Anything else is unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def shorts(values: Iterable[Any] | None) -> list[Any] | None:
    """`short` of each; None stays None."""
    return None if values is None else [short(value) for value in values]


def rounded(values: Iterable[float] | None, decimals: int = DIGITS) -> list[float | None] | None:
    """The values with a fixed number of decimals, for the many values of tokens: much faster than `shorts`."""
    if values is None:
        return None
    return [round(value, decimals) if math.isfinite(value) else None for value in values]


def mean(values: Sequence[float]) -> float:
    """The mean; nan if there are none."""
    return math.fsum(values) / len(values) if values else math.nan
