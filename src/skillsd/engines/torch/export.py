"""The student's weights as a plain model folder: adapters merged, for sampling engines and for export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def write_merged(model: nn.Module, folder: Path, *, untie: bool) -> None:
    """Write `model` in the format of ``transformers``, adapters merged.

    Args:
        untie: write the output head separately even if it is tied to the embeddings, for samplers: vLLM's CPU build
            does not update a tied head, and reports no error. Done in any case if the head or the embeddings have an
            adapter, because their merged weights differ.
    """
    plain = without_adapters(model)
    for old in folder.glob("*.safetensors"):  # otherwise both would be there until the new one is complete
        old.unlink()
    weights = merged_weights(plain)
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    adapted = any(hasattr(module, "get_delta_weight") for module in (head, embeddings))
    untied: dict[str, Tensor] = {}
    if head.weight is embeddings.weight and (untie or adapted):
        name = _unwrapped(next(name for name, module in plain.named_modules() if module is head))
        untied = {f"{name}.weight": weights.pop(f"{name}.weight").detach()}
    plain.save_pretrained(folder, state_dict=weights, max_shard_size="10TB")
    if untied:
        save_file(untied, folder / "head.safetensors")
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")


def bytes_written(model: nn.Module) -> int:
    """The most bytes that `write_merged` writes, counting the output head separately, tied or not."""
    plain = without_adapters(model)
    return sum(w.numel() * w.element_size() for w in [*model.parameters(), plain.get_output_embeddings().weight])


def without_adapters(model: nn.Module) -> Any:
    """The model inside its adapters' wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def merged_weights(plain: nn.Module) -> dict[str, Tensor]:
    """The merged weights, with the names and dtypes that the model has without adapters.

    Each matrix is merged in float32, the adapters' dtype, and moved to the CPU before the next. The model is unchanged.
    """
    weights = {_unwrapped(name): weight for name, weight in plain.state_dict().items() if ".lora_" not in name}
    for name, module in plain.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        # An adapter of a bare parameter (as of experts) has its name; several of one module are nested in each other.
        key = f"{_unwrapped(name)}.{getattr(module, 'parameter_name', 'weight')}"
        with torch.no_grad():
            for adapter in module.active_adapters:
                delta = module.get_delta_weight(adapter)
                weights[key] = (weights[key].to(delta.device) + delta).to(weights[key].dtype).cpu()
    return weights


def _unwrapped(name: str) -> str:
    """The name of a module or weight without peft's wrappers."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
