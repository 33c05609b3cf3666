"""Steps on repeated words before the demonstrations: what is trained on, and that a new model learns to copy."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from skillsd import config as configs
from skillsd.config import SftConfig
from skillsd.envs import load
from skillsd.warm_start import sft

SMALL = ["new.layers=2", "new.hidden_size=32", "new.heads=2", "new.intermediate_size=32", "warm_start.batch=4"]


def run(folder: Path, *overrides: str) -> tuple[Any, list[sft.SftProgress]]:
    config = configs.load(SftConfig, "rulebook-base", [*SMALL, *overrides])
    seen: list[sft.SftProgress] = []
    folder.mkdir()
    engine = asyncio.run(sft.train(config, load("rulebook", {}), folder, seen.append))
    return engine, seen


def test_the_second_half_repeats_the_first_and_is_what_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Any] = []
    repeats = sft._repeats

    def watch(*args: Any) -> Any:
        for item in repeats(*args):
            batches.append(item)
            yield item

    monkeypatch.setattr(sft, "_repeats", watch)
    engine, seen = run(tmp_path / "m", "new.copying_steps=10", "warm_start.steps=2")
    assert [progress.step for progress in seen] == list(range(1, 13))
    assert {progress.steps for progress in seen} == {12}
    assert len(batches) == 10 * 4
    words: set[int] = set()
    for item in batches:
        tokens, half = item.sequence.tokens, len(item.sequence.tokens) // 2
        assert tokens[:half] == tokens[half:]
        assert len(set(tokens)) == half
        assert 4 <= half <= sft.REPEATED_WORDS
        assert item.sequence.mask == (*[False] * half, *[True] * half)
        words |= set(tokens)
    known = {engine.tokenizer.decode([word]).strip() for word in words}
    assert {"red", "bell", "Yes", "No"} <= known


def test_without_them_the_demonstrations_come_first(tmp_path: Path) -> None:
    _, seen = run(tmp_path / "m", "new.copying_steps=0", "warm_start.steps=3")
    assert [(p.step, p.steps) for p in seen] == [(1, 3), (2, 3), (3, 3)]


def test_they_are_the_same_in_every_run_and_others_with_another_seed(tmp_path: Path) -> None:
    losses = [
        [p.loss for p in run(tmp_path / str(i), f"seed={seed}", "new.copying_steps=3", "warm_start.steps=1")[1]]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]
    assert len(list(itertools.chain(*losses))) == 12
