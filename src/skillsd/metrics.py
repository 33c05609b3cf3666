"""Metrics that merge exactly over micro-batches and processes. No torch."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

BINS_PER_DECADE = 32
"""Resolution of a `Histogram`: neighbouring bin edges differ by 7.5 %."""

ZERO_BIN = -(10**6)
"""The bin that counts exact zeros."""

INFINITE_BIN = 10**6
"""The bin that counts infinite values and nan."""


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, kept as a sum and a count, with the smallest and largest value."""

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
        """The mean; nan if nothing was counted."""
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True)
class Histogram:
    """Non-negative values on a logarithmic grid, for quantiles without keeping the values.

    Attributes:
        counts: bin -> number of values. Bin b holds the values in ``[10^(b / n), 10^((b + 1) / n))`` with
            n = `BINS_PER_DECADE`; exact zeros are in `ZERO_BIN`, infinite values in `INFINITE_BIN`.
        high: the largest value, exact. A nan counts as infinite.
    """

    counts: Mapping[int, int] = field(default_factory=dict)
    high: float = 0.0

    def __add__(self, other: Histogram) -> Histogram:
        counts = dict(self.counts)
        for bin_, count in other.counts.items():
            counts[bin_] = counts.get(bin_, 0) + count
        return Histogram(counts, max(self.high, other.high))

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def quantile(self, q: float) -> float:
        """The q-quantile, rounded up to its bin's edge and never above the largest value; nan for no values."""
        if not self.counts:
            return math.nan
        rank = round(q * (self.count - 1))
        seen = 0
        for bin_ in sorted(self.counts):
            seen += self.counts[bin_]
            if seen > rank:
                break
        if bin_ == INFINITE_BIN:
            return math.inf
        return 0.0 if bin_ == ZERO_BIN else min(self.high, 10 ** ((bin_ + 1) / BINS_PER_DECADE))


@dataclass(frozen=True)
class PerToken:
    """A value per token, for the records of an iteration. Each carries its token's number, so that micro-batches merge
    in any order.

    Attributes:
        tokens: the tokens' numbers in the training batch, int64.
        values: of these tokens, float32.
    """

    tokens: array[int]
    values: array[float]

    def __add__(self, other: PerToken) -> PerToken:
        return PerToken(self.tokens + other.tokens, self.values + other.values)


Metric = Mean | Histogram | PerToken
Metrics = dict[str, Metric]


def add_metrics(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
    """The merged metrics of several micro-batches. A micro-batch without tokens for a metric leaves it out."""
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name] + metric if name in merged else metric  # type: ignore[operator]
    return merged
