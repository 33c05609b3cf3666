"""Two ranks compute what one process computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engines.ranks.kit import (
    NoRoom,
    Seen,
    episodes,
    in_ranks,
    items,
    moments,
    one_process,
    relative_gap,
    set_most_logits,
    steps,
)
from skillsd.engines.base import Engine
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch import lm_head
from skillsd.engines.torch.ranks.leader import Leader
from skillsd.engines.torch.ranks.orders import Ranks
from skillsd.objective import Objective

LORA = {"lora": LoraOptions(rank=4, alpha=8)}
OWN = {"teacher_follows": False}

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": ({}, {}),
    "checkpointing, logits in chunks": ({"gradient_checkpointing": True, "most_logits": 40 * 300}, {}),
    "averaged teacher": (OWN, {"rate": 0.3}),
    "lora, averaged teacher": ({**LORA, **OWN}, {"rate": 0.3}),
    "external teacher": ({"teacher_model": "untied"}, {}),
    "whole vocabulary": (OWN, {"objective": {"estimator": "reverse_kl"}}),
    "top k": (OWN, {"objective": {"estimator": "reverse_kl", "top_k": 5}}),
    "bfloat16, averaged teacher": ({"dtype": "bfloat16", **OWN}, {"rate": 0.3}),
    "lora in bfloat16": ({"dtype": "bfloat16", **LORA}, {}),
}


@pytest.fixture(scope="module")
def alone(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    """The same steps in one process, made once for each setting."""
    found: dict[str, Seen] = {}

    def seen(name: str) -> Seen:
        if name not in found:
            options, how = prepared(name, model_folder)
            engine = one_process(model_folder("qwen3"), **options)
            found[name] = steps(engine, tmp_path_factory.mktemp("alone"), **how)
        return found[name]

    return seen


def prepared(name: str, model_folder: Callable[[str], Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    options, how = map(dict, SETTINGS[name])
    options.pop("most_logits", None)
    if "teacher_model" in options:
        options["teacher_model"] = str(model_folder("llama-untied"))
    return options, {**how, "objective": Objective(lambda_sdl=0.3, **how.get("objective", {}))}


FAST = {("averaged teacher", "layers"), ("bfloat16, averaged teacher", "state")}
CASES = [
    pytest.param(name, shard, marks=[] if (name, shard) in FAST else [pytest.mark.slow])
    for name in SETTINGS
    for shard in ("state", "layers")
]


@pytest.mark.parametrize(("name", "shard"), CASES)
def test_steps_are_those_of_one_process(
    name: str,
    shard: str,
    ranks: Ranks,
    alone: Callable[[str], Seen],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    before = lm_head.MAX_LOGITS
    most = SETTINGS[name][0].get("most_logits", before)
    ranks.make(set_most_logits, most)
    try:
        expected = alone(name)
        options, how = prepared(name, model_folder)
        found = steps(in_ranks(ranks, shard, model_folder("qwen3"), **options), tmp_path, **how)
    finally:
        ranks.make(set_most_logits, before)
    exact = options.get("dtype") != "bfloat16"
    assert relative_gap(found.gradient, expected.gradient) < (1e-6 if exact else 0.02)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5 if exact else 0.05, abs=1e-6 if exact else 0.01)
    norms = [report.grad_norm for report in expected.reports]
    assert [report.grad_norm for report in found.reports] == pytest.approx(norms, rel=1e-5 if exact else 0.02)
    assert found.saved.keys() == expected.saved.keys()
    for part in ("weights", "teacher", "teacher_averages"):
        a, b = found.saved[part], expected.saved[part]
        assert (a is None) == (b is None)
        if b:
            assert list(a) == list(b)
            assert [t.dtype for t in a.values()] == [t.dtype for t in b.values()]
            assert relative_gap(list(a.values()), list(b.values())) < (1e-4 if exact else 0.02)


@pytest.mark.parametrize("shard", ["state", "layers"])
def test_one_sequence_for_two_ranks(
    shard: str, ranks: Ranks, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """One of the ranks has nothing to do, in every call."""
    how: dict[str, Any] = {"objective": Objective(lambda_sdl=0.3), "played": episodes()[-1:]}
    expected = steps(one_process(model_folder("qwen3")), tmp_path / "one", **how)
    found = steps(in_ranks(ranks, shard, model_folder("qwen3")), tmp_path / "two", **how)
    assert relative_gap(found.gradient, expected.gradient) < 1e-6
    assert relative_gap(list(found.saved["weights"].values()), list(expected.saved["weights"].values())) < 1e-4


def test_a_rank_out_of_memory_has_all_ranks_repeat_with_smaller_micro_batches(
    ranks: Ranks, model_folder: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In scoring, in a pass whose part of the gradient was added already, and after an earlier call had added its."""
    failed: list[list[int]] = []

    async def step(engine: Engine, folder: Path, allow: Callable[[int], object]) -> list[Tensor]:
        allow(300)
        batch = await items(engine.learner, objective, episodes(4, 8))
        loss = objective.template.bind(item.signals for item in batch)
        for part, room in ((batch[:16], 120), (batch[16:], 50)):
            allow(room)
            await engine.learner.forward_backward(part, loss)
        assert (await engine.learner.step(3e-3)).applied
        folder.mkdir()
        await engine.learner.save_state(folder)
        return moments(folder)

    objective, options = Objective(lambda_sdl=0.3), {"micro_batch_tokens": 4000}
    alone = one_process(model_folder("qwen3"), **options)
    expected = asyncio.run(step(alone, tmp_path / "one", lambda tokens: None))
    engine = in_ranks(ranks, "state", model_folder("qwen3"), **options)
    fault = ranks.make(NoRoom)
    try:
        found = asyncio.run(step(engine, tmp_path / "two", lambda room: failed.append(fault.call("allow", room))))
    finally:
        failed.append(fault.call("end"))
    assert [own for own, _ in failed] == [0, 0, 0, 0]
    scored, first, second = (after[1] - before[1] for before, after in pairwise(failed))
    assert min(scored, first, second) > 0
    assert relative_gap(found, expected) < 1e-6
    assert isinstance(engine.learner, Leader)
    assert 0 < engine.learner.own.micro_batches.budget <= 120
    assert caplog.text.count("out of memory in a forward pass") == scored + first + second
