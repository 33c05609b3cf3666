"""Figures of a micro-batch that can be added up over micro-batches and processes. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, kept as a sum and a count, with the range that was seen."""

    total: float
    count: float
    low: float = math.inf
    high: float = -math.inf

    def __add__(self, other: Mean) -> Mean:
        return Mean(
            self.total + other.total,
            self.count + other.count,
            min(self.low, other.low),
            max(self.high, other.high),
        )

    @property
    def value(self) -> float:
        """The mean; nan where nothing was counted."""
        return self.total / self.count if self.count else math.nan


Metrics = dict[str, Mean]


def add_metrics(parts: Iterable[Mapping[str, Mean]]) -> Metrics:
    """Metrics of micro-batches, added up. A metric is absent from a micro-batch that had no tokens for it."""
    summed: Metrics = {}
    for part in parts:
        for name, mean in part.items():
            summed[name] = summed[name] + mean if name in summed else mean
    return summed
