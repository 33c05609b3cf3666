"""Weights that leave the trainer, published, exported or saved: the folder predicts what the trained model predicts."""

from __future__ import annotations

import asyncio
import resource
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

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
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert (tmp_path / "model.safetensors").stat().st_size < engine.learner.published_bytes


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


# -- every way out, for every kind of adapter -------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "the tied head": {"target_modules": ["q_proj", "lm_head"]},
    "the tied embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "dora": {"use_dora": True},
    "dora of the head": {"use_dora": True, "target_modules": ["lm_head"]},
    "rslora": {"use_rslora": True},
    "bias": {"bias": "lora_only"},
    "whole modules": {"modules_to_save": ["lm_head", "norm"]},
    "single tokens": {"trainable_token_indices": [3, 4, 5]},
    "nested parameters": {
        "target_parameters": ["q_proj.weight", "up_proj.weight"],
        "target_modules": [],
        "lora_dropout": 0.0,
    },
}


def write_adapter(model: Path, folder: Path, options: dict[str, Any]) -> LoraOptions:
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 16, "lora_dropout": 0.3, "target_modules": "all-linear", **options},
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(3)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return LoraOptions(adapter=str(folder))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_way_out_predicts_what_the_model_predicts(kind: str, tied_folder: Path, tmp_path: Path) -> None:
    engine = embedded(tied_folder, lora=write_adapter(tied_folder, tmp_path / "adapter", ADAPTERS[kind]))
    train(engine, 2)
    sequence = marked_all(DATA.ids(20, 0))
    trained = distribution(engine, sequence)
    assert gap(trained, tiny.Plain(tied_folder).logprobs(sequence.tokens)[:-1]) > 0.05
    ways = {"published": engine.learner.publish, "merged": lambda f: engine.learner.export(f, merge=True)}
    for name, write in ways.items():
        asyncio.run(write(tmp_path / name))
        assert gap(trained, tiny.Plain(tmp_path / name).logprobs(sequence.tokens)[:-1]) < 1e-4, name
        assert torch.equal(distribution(engine, sequence), trained)
    (tmp_path / "saved").mkdir()
    asyncio.run(engine.learner.export(tmp_path / "exported", merge=False))
    asyncio.run(engine.learner.save_state(tmp_path / "saved"))
    for folder in (tmp_path / "exported", tmp_path / "saved" / "model"):
        plain = tiny.Plain(tied_folder)
        plain.model = PeftModel.from_pretrained(plain.model, folder).eval()
        assert gap(trained, plain.logprobs(sequence.tokens)[:-1]) < 1e-4, folder
        assert not (folder / "README.md").exists()  # peft's empty model card


@pytest.mark.parametrize("way", ["published", "merged", "exported", "saved"])
def test_folder_that_predicts_something_else_is_refused(
    way: str, tied_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason will be: here, another library's writer that scales a weight."""
    engine = embedded(tied_folder, lora=LoraOptions(rank=4))
    train(engine, 2)
    model: Any = torch_engine(engine).model
    inner = model.get_base_model()
    for owner in (model, inner):
        write = owner.save_pretrained

        def writes(folder: Path, *given: Any, write: Any = write, **more: Any) -> None:
            write(folder, *given, **more)
            for file in Path(folder).glob("*.safetensors"):
                save_file({n: 3 * w for n, w in load_file(file).items()}, file, metadata={"format": "pt"})

        monkeypatch.setattr(owner, "save_pretrained", writes, raising=False)
    folder = tmp_path / way
    folder.mkdir()
    learner = engine.learner
    calls = {
        "published": lambda: learner.publish(folder),
        "merged": lambda: learner.export(folder, merge=True),
        "exported": lambda: learner.export(folder, merge=False),
        "saved": lambda: learner.save_state(folder),
    }
    with pytest.raises(UserError, match=r"differ from the model in training: their predictions are off by .* nats"):
        asyncio.run(calls[way]())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_cause_no_warnings(checkpointing: bool, tied_folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        engine = embedded(tied_folder, lora=LoraOptions(rank=4), gradient_checkpointing=checkpointing)
        train(engine)
        (tmp_path / "state").mkdir()
        asyncio.run(engine.learner.save_state(tmp_path / "state"))
        asyncio.run(engine.learner.export(tmp_path / "merged", merge=True))
        embedded(tied_folder, lora=LoraOptions(adapter=str(tmp_path / "state" / "model")))
