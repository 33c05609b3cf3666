"""Tokens and cost of an iteration at a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from skillsd.config import RunConfig, load
from skillsd.engines.estimate import Workload
from skillsd.engines.tinker.options import TinkerOptions
from skillsd.engines.tinker.settings import Prices
from skillsd.engines.tinker.usage import cost, tokens
from skillsd.runs.checks import check_config, engine_spec, workload

WORK = Workload(episodes=3, turns=4, turn_tokens=10, trajectory_tokens=100, minibatches=2, epochs=2)
DOCS = Path(__file__).parents[2] / "docs" / "tinker.md"


def test_tokens_of_an_iteration() -> None:
    """An episode: 40 sampled, 60 prompt and observations; prompts of 4 turns, on average half of its length."""
    found = tokens(WORK, 20, taught=True, general=False)
    assert found["sample"] == 3 * 40
    assert found["prefill"] == 3 * 60
    assert found["prefill"] + found["cached"] == 3 * 4 * 50
    assert found["train"] == 2 * 3 * 100
    teacher, general = 3 * (100 + 20), 2 * 3 * 100
    assert found["score"] == teacher + general - 3 * 100 // 2  # the first of two minibatches is one datum
    assert tokens(WORK, 20, taught=True, general=True)["score"] == teacher + general
    assert tokens(WORK, 20, taught=False, general=True)["score"] == general


def test_cost_needs_three_prices_and_fills_in_the_others() -> None:
    found = {"prefill": 10, "cached": 20, "sample": 30, "score": 40, "train": 50}
    assert cost(found, Prices(prefill=1, sample=2)) is None
    assert cost(found, Prices(prefill=1, sample=2, train=3)) == pytest.approx((30 + 60 + 270) / 1e6)
    assert cost(found, Prices(prefill=1, cached=0, sample=2, score=1, train=3)) == pytest.approx(260 / 1e6)


def test_the_recipe_fits_the_engine_and_its_tokens_are_documented() -> None:
    config = load(RunConfig, "sokoban-tinker")
    check_config(config)
    assert isinstance(config.engine, TinkerOptions)
    spec, work = engine_spec(config), workload(config, 40)
    text = DOCS.read_text(encoding="utf-8")
    for count in tokens(work, spec.context_tokens, taught=True, general=False).values():
        assert f"| {count:,} |" in text
    lines = "\n".join(config.engine.usage(spec, work, 120))
    assert "engine.prices.prefill" in lines
    priced = load(RunConfig, "sokoban-tinker", ["engine.prices={prefill: 1, sample: 1, train: 1}"])
    assert "30.22 in the currency" in "\n".join(priced.engine.usage(spec, work, 120))
