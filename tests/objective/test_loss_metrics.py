"""Metrics merge over micro-batches: the parts' sum is the metric of the whole."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skillsd.metrics import BINS_PER_DECADE, Histogram, Mean, add_metrics
from skillsd.objective.loss import histogram, means

RESOLUTION = 10 ** (1 / BINS_PER_DECADE) * (1 + 1e-9)

sizes = st.one_of(st.just(0.0), st.floats(1e-30, 1e29))
values = st.one_of(sizes, sizes.map(lambda x: -x), st.sampled_from([math.inf, -math.inf, math.nan]))
parts = st.lists(st.lists(values, max_size=20), max_size=5)


def of(numbers: list[float]) -> Histogram:
    return histogram(torch.tensor(numbers, dtype=torch.float64))


@given(parts)
def test_sum_of_histograms_is_the_histogram_of_all_values(lists: list[list[float]]) -> None:
    merged = sum((of(part) for part in lists), Histogram())
    whole = of([value for part in lists for value in part])
    assert merged == whole
    assert merged.count == sum(map(len, lists))
    backwards = sum((of(part) for part in reversed(lists)), Histogram())
    assert backwards == whole


@given(st.lists(st.one_of(sizes, sizes.map(lambda x: -x)), min_size=1, max_size=60), st.floats(0, 1))
def test_quantile_is_within_the_resolution_of_a_bin(numbers: list[float], q: float) -> None:
    ordered = sorted(map(abs, numbers))
    exact = ordered[round(q * (len(ordered) - 1))]
    found = of(numbers).quantile(q)
    assert exact * (1 - 1e-9) <= found <= exact * RESOLUTION
    assert found <= ordered[-1]
    assert of(numbers).quantile(1.0) == ordered[-1]  # the largest value is exact


def test_zeros_nan_and_infinity() -> None:
    found = of([0.0, -0.0, 0.0, 1.0])
    assert (found.quantile(0.0), found.quantile(0.5), found.quantile(1.0)) == (0.0, 0.0, 1.0)
    for bad in (math.nan, math.inf, -math.inf):  # a nan counts as infinite, so it can't hide
        found = of([0.0, 1.0, 2.0, bad])
        assert found.high == found.quantile(1.0) == math.inf
        assert found.quantile(0.5) == pytest.approx(2.0, rel=0.08)
        assert found.count == 4
    assert of([1e35]).quantile(1.0) <= 1e35  # beyond the grid, but finite
    assert of([1e-35]).quantile(1.0) == 1e-35


def test_empty_histogram() -> None:
    assert of([]) == Histogram()
    assert math.isnan(Histogram().quantile(0.5))
    assert Histogram().count == 0


def test_means_add_up() -> None:
    whole = add_metrics([{"a": Mean(2.0, 1, 2.0, 2.0)}, {}, {"a": Mean(1.0, 2, 0.0, 1.0), "b": Mean(1.0, 4)}])
    assert whole == {"a": Mean(3.0, 3, 0.0, 2.0), "b": Mean(1.0, 4)}
    a = whole["a"]
    assert isinstance(a, Mean)
    assert a.value == 1.0
    assert math.isnan(Mean(0.0, 0).value)


def test_means_of_vectors() -> None:
    """Of any lengths; a mask becomes a share; an empty vector has no mean."""
    found = means(
        {
            "numbers": torch.tensor([1.0, 2.0, 6.0], requires_grad=True),
            "mask": torch.tensor([True, False, False]),
            "empty": torch.zeros(0),
            "short": torch.tensor([4.0], dtype=torch.bfloat16),
        }
    )
    assert list(found) == ["numbers", "mask", "short"]
    assert found == {"numbers": Mean(9.0, 3, 1.0, 6.0), "mask": Mean(1.0, 3, 0.0, 1.0), "short": Mean(4.0, 1, 4.0, 4.0)}


def test_merging_mixes_kinds_of_metrics_and_survives_pickling() -> None:
    one = {"a": Mean(1.0, 1, 1.0, 1.0), "h": of([1.0, 0.0])}
    other = pickle.loads(pickle.dumps({"h": of([3.0]), "b": Mean(2.0, 1, 2.0, 2.0)}))
    assert add_metrics([one, other]) == {"a": one["a"], "h": of([0.0, 1.0, 3.0]), "b": other["b"]}
