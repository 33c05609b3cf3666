"""LoRA: adapters are exported, merged and loaded again, and a teacher's copy costs only an adapter's memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_run import toy_settings

from skillsd.config import RunConfig, load
from skillsd.engines.base import Learner, TokenSequence
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch.engine import TorchEngine
from skillsd.errors import UserError
from skillsd.runs.build import make_engine
from skillsd.runs.export import export
from skillsd.runs.lifecycle import run_training
from skillsd.runs.subjects import load_trained

SEQUENCES = [TokenSequence(tuple(range(30, 50)), (False,) * 8 + (True,) * 12)]
LORA: dict[str, Any] = {"lora": {"rank": 2, "alpha": 8}}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished LoRA run (`run`) and its recipe."""
    folder = tmp_path_factory.mktemp("lora")
    settings = toy_settings(tiny_model, training={"iterations": 2, "learning_rate": 0.03})
    settings["model"] |= LORA
    (folder / "toy.yaml").write_text(yaml.safe_dump(settings))
    run_training(load(RunConfig, str(folder / "toy.yaml")), folder / "run")
    return folder


def scores(learner: Learner) -> torch.Tensor:
    [found] = asyncio.run(learner.logprobs(SEQUENCES))
    return found.chosen


def test_adapter_is_exported_merged_and_loaded_again(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    export(str(run / "run"), tmp_path / "adapter")
    export(str(run / "run"), tmp_path / "merged", merge=True)
    engine, _ = asyncio.run(load_trained(run / "run"))
    trained = scores(engine.learner)
    base = scores(TorchEngine(str(tiny_model), device="cpu"))
    assert (trained - base).abs().max() > 0.01
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert sum(p.stat().st_size for p in (tmp_path / "adapter").glob("*.safetensors")) < 40_000
    merged = TorchEngine(str(tmp_path / "merged"), device="cpu")  # an ordinary model folder
    assert torch.allclose(scores(merged), trained, atol=1e-4)
    settings = toy_settings(tiny_model)
    settings["model"]["adapter"] = str(tmp_path / "adapter")
    learner: Any = make_engine(RunConfig.model_validate(settings)).learner
    assert torch.allclose(scores(learner), trained, atol=1e-6)
    names = [name for name, p in learner.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)  # training continues with the adapter


def test_mistakes_are_refused(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    def make(**model: Any) -> None:
        settings = toy_settings(tiny_model)
        settings["model"] |= model
        make_engine(RunConfig.model_validate(settings))

    with pytest.raises(UserError, match=r"no adapter in '/no/where'.*adapter_config.json"):
        make(adapter="/no/where")
    with pytest.raises(UserError, match="Leave one of them out"):
        make(adapter="/no/where", **LORA)
    (tmp_path / "full").mkdir()
    with pytest.raises(UserError, match="is not a run's folder"):
        export(str(tmp_path / "full"), tmp_path / "x")
    with pytest.raises(UserError, match="is not empty"):
        export(str(run / "run"), run)


def test_run_without_an_adapter_has_nothing_to_merge(tiny_model: Path, tmp_path: Path, make_run: Any) -> None:
    settings = toy_settings(tiny_model, training={"iterations": 0})
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(settings))
    run_training(load(RunConfig, str(tmp_path / "toy.yaml")), tmp_path / "full")
    with pytest.raises(UserError, match="no adapter to merge"):
        export(str(tmp_path / "full"), tmp_path / "x", merge=True)
    export(str(tmp_path / "full"), tmp_path / "x")
    assert (tmp_path / "x" / "model.safetensors").is_file()


def held(engine: TorchEngine) -> int:
    """Bytes of all weights and their copies, each storage counted once."""
    found: dict[int, int] = {}
    for tensor in [*engine.model.parameters(), *(engine.teacher or {}).values(), *engine.teacher_averages.values()]:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("rate", [1.0, 0.5], ids=["lagging", "average"])
def test_teacher_copy_under_lora_costs_an_adapter_not_a_model(tiny_model: Path, rate: float) -> None:
    def engine(**options: Any) -> TorchEngine:
        made = TorchEngine(str(tiny_model), device="cpu", **options)
        if not options["teacher_follows"]:
            asyncio.run(made.sync_teacher(rate))
        return made

    lora = LoraOptions(rank=2)
    alone = engine(lora=lora, teacher_follows=True)
    adapter = sum(p.nbytes for p in alone.model.parameters() if p.requires_grad)
    assert held(engine(lora=lora, teacher_follows=False)) - held(alone) == adapter
    assert adapter < 0.2 * held(alone)
    model = sum(p.nbytes for p in engine(teacher_follows=True).model.parameters())
    both = [held(engine(teacher_follows=follows)) for follows in (True, False)]
    assert both[1] - both[0] == model
