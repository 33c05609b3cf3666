"""`benchmarks/scale.py` still runs on today's code: the smallest size of the loop's cost, and the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale

    return scale


def test_cost_of_the_loop(scale: Any) -> None:
    found = scale.loop(16)
    assert min(found.values()) > 0
    assert found["iteration"] == pytest.approx(found["rollout"] + found["learn"])
    assert len(list(scale.loop_table({16: [found], 32: [found]}))) == 5


def test_growth(scale: Any) -> None:
    assert scale.growth([2, 4, 8], [3.0, 3.0, 3.0]) == pytest.approx(1)  # the same time per episode
    assert scale.growth([2, 4, 8], [1.0, 2.0, 4.0]) == pytest.approx(2)


def test_ratios_of_sides(scale: Any) -> None:
    one = {"seconds": 2.0, "cpu": 1.0, "leader": 1.0, "mib": 400.0, "mib 0": 400.0} | dict.fromkeys(scale.TRAFFIC, 0)
    two = {**one, "seconds": 1.0, "cpu": 1.5, "mib": 800.0, "mib 1": 400.0, "messages": 2048}
    sides = {"one process": [one], "two ranks": [two], "one replica": [one], "two replicas": [two]}
    rows = list(scale.sides_table(sides))
    assert "| **two ranks / one process** | 0.50 x | 1.50 x | 1.00 x | 2.00 x | |" in rows
    cells = "1.00 s (1.00 to 1.00) | 1.50 s (1.50 to 1.50) | 1.00 s (1.00 to 1.00) | 400 + 400 MiB | 2, 0, 0"
    assert f"| two ranks | {cells} |" in rows
