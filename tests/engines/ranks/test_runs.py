"""A training run in two ranks has the metrics of one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch.distributed as dist
from toy_run import MakeRun, go, without_clocks

from skillsd.engines.torch.ranks import group, launched
from skillsd.engines.torch.ranks.leader import Leader
from skillsd.engines.torch.ranks.orders import Ranks

ROUNDING = "sampler_trainer_logprob_diff/"
"""Metrics of what differs by rounding alone."""


@pytest.mark.parametrize(
    ("shard", "sections"),
    [
        ("state", {"training": {"iterations": 3}}),
        pytest.param(
            "layers",
            {
                "training": {"iterations": 3},
                "method": "teacher-rollouts-frozen",
                "model": {"gradient_checkpointing": True},
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_metrics_are_those_of_one_process(
    shard: str, sections: dict[str, Any], ranks: Ranks, make_run: MakeRun
) -> None:
    alone, led = make_run("one", **sections), make_run("two", engine={"shard": shard}, **sections)
    assert isinstance(led.learner, Leader)
    expected, found = go(alone), go(led)
    assert len(found.iterations) == 3
    for kind in ("iterations", "evaluations"):
        pairs = zip(without_clocks(getattr(found, kind)), without_clocks(getattr(expected, kind)), strict=True)
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                if name.startswith(ROUNDING):
                    assert value < 1e-4
                elif isinstance(value, float) and not math.isnan(value):
                    assert value == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name


def test_addresses_of_an_earlier_start_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its store over a restart, with the addresses of ranks that are gone."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 0, 2)]))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert launched.size() == 2
    group.torchrun_store().set("orders", "gone")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not group.torchrun_store().check(["orders"])
