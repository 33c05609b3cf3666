"""Weights published as a model folder: adapters merged, with an untied output head."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engines import tiny
from engines.tiny import DATA, distribution, embedded, marked_all, torch_engine, train, view
from skillsd.engines.base import WeightsHandle
from skillsd.engines.conformance.kit import gap
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch.export import write_merged
from skillsd.errors import UserError


def test_full_disk_is_named(tied_folder: Path, tmp_path: Path) -> None:
    engine = embedded(tied_folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=rf"can't write the weights.*GiB\) into '{tmp_path}'.*TMPDIR"):
            asyncio.run(engine.learner.publish(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_merged_weights_keep_their_dtype(tied_folder: Path, tmp_path: Path) -> None:
    """Although adapters, and sums with them, are float32."""
    engine = embedded(tied_folder, dtype="bfloat16", lora=LoraOptions(rank=4, alpha=8))
    train(engine, 2)
    asyncio.run(engine.learner.publish(tmp_path))
    for file in ("model.safetensors", "head.safetensors"):
        assert {weight.dtype for weight in load_file(tmp_path / file).values()} == {torch.bfloat16}
    written = sum((tmp_path / file).stat().st_size for file in ("model.safetensors", "head.safetensors"))
    assert written < engine.learner.published_bytes


def test_adapters_of_experts_are_merged(tmp_path: Path) -> None:
    kind, sizes = tiny.ARCHITECTURES["qwen3-moe"]
    model = tiny.write(tmp_path / "moe", kind, {**sizes, "tie_word_embeddings": False})
    engine = embedded(model, lora=LoraOptions(rank=2, alpha=8))
    train(engine, 3)
    write_merged(torch_engine(engine).model, tmp_path / "out", untie=True)
    sequence = marked_all(DATA.ids(20, 0))
    trained = distribution(engine, sequence)
    assert gap(trained, tiny.Plain(model).logprobs(sequence.tokens)[:-1]) > 1e-3
    assert gap(trained, tiny.Plain(tmp_path / "out").logprobs(sequence.tokens)[:-1]) < 1e-4


HEAD = LoraOptions(rank=4, alpha=8, target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize(
    "options", [{}, {"lora": LoraOptions(rank=4, alpha=8)}, {"lora": HEAD}], ids=["full", "lora", "lora of the head"]
)
def test_published_weights_are_the_model_with_an_untied_head(
    options: dict[str, Any], tied_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    engine = embedded(tied_folder, **options)
    train(engine, 3)
    before = view(engine)
    handle = asyncio.run(engine.learner.publish(tmp_path))
    assert handle == WeightsHandle(3, str(tmp_path))
    assert torch.equal(view(engine), before)
    tiny.assert_is_written(engine, tmp_path)
