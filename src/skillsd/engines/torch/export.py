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
        untie: give the output head weights of its own even if it is tied to the embeddings. Sampling engines want that:
            vLLM's CPU build does not renew a tied head, without an error. Done in any case if the head or the
            embeddings have an adapter: merged, they are no longer the same.
    """
    plain = without_adapters(model)
    for old in folder.glob("*.safetensors"):  # otherwise it would stay until the new one is complete: twice the room
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
    """The most bytes that `write_merged` writes: the output head counts apart, tied or not."""
    plain = without_adapters(model)
    return sum(w.numel() * w.element_size() for w in [*model.parameters(), plain.get_output_embeddings().weight])


def without_adapters(model: nn.Module) -> Any:
    """The model inside its adapters' wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def merged_weights(plain: nn.Module) -> dict[str, Tensor]:
    """The weights under the names and in the dtypes that they have without adapters.

    Merged matrices are made one at a time, in the CPU's memory; the sum is in float32, as the adapters are. The weights
    in training are not touched.
    """
    weights = {_unwrapped(name): weight for name, weight in plain.state_dict().items() if ".lora_" not in name}
    for name, module in plain.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        # Adapters of a bare parameter (experts have some) name it; those of one module are nested in each other.
        key = f"{_unwrapped(name)}.{getattr(module, 'parameter_name', 'weight')}"
        with torch.no_grad():
            for adapter in module.active_adapters:
                delta = module.get_delta_weight(adapter)
                weights[key] = (weights[key].to(delta.device) + delta).to(weights[key].dtype).cpu()
    return weights


def _unwrapped(name: str) -> str:
    """The name of a module or weight without peft's wrappers."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
