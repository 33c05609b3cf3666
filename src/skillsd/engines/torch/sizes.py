"""A model's sizes from its configuration: parameters by use, KV cache, adapters. No weights are loaded."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skillsd.engines.options import LoraOptions
from skillsd.errors import UserError

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-4B-Instruct-2507": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 262144,
    }
}
"""Configurations of hub models that the recipes use, for estimates on machines without access to the hub."""


@dataclass(frozen=True)
class Sizes:
    """A model's sizes.

    Attributes:
        parameters: of all weights, tied ones once.
        matrices: parameters of the weight matrices that a token is multiplied with, in all layers without the output
            head; of experts, those that it is routed to.
        head: parameters of the output head.
        flow: inputs and outputs of these matrices per token, in all layers.
        cache: elements of the KV cache per token.
        queries: width of a layer's queries, all heads together.
        adapter: trainable parameters per unit of LoRA's rank.
        adapted_in: inputs of matrices with an adapter per token, in all layers.
        adapted_out: the most outputs of one such matrix.
        rebuilt: weights of experts with adapters, which peft merges anew in each pass.
        unknown: parameters of the language model whose use is unknown.
    """

    parameters: int
    matrices: int
    head: int
    flow: int
    cache: int
    layers: int
    hidden: int
    queries: int
    vocabulary: int
    adapter: int
    adapted_in: int
    adapted_out: int
    rebuilt: int
    unknown: int

    @classmethod
    def of(cls, name: str, targets: str | list[str] = "all-linear") -> Sizes:
        """Sizes of the model `name`, from its config.json."""
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        architecture = read_architecture(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture)
        # In a multimodal model, tokens pass only through the text decoder; the rest just takes memory.
        text, decoder = architecture.get_text_config(), model.get_decoder()
        output, within = model.get_output_embeddings(), {id(module) for module in decoder.modules()}
        linear = {
            path: (*(module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]), id(module))
            for path, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not output
        }
        adapted = [shape for path, shape in linear.items() if _is_target(path, targets)]
        experts = [
            tuple(weight.shape)
            for module in decoder.modules()
            for weight in module.parameters(recurse=False)
            if weight.ndim == 3 and getattr(module, "num_experts", None) == len(weight)
        ]
        asked = getattr(text, "num_experts_per_tok", None) or 0
        own = [(a, b) for a, b, module in linear.values() if module in within]
        shapes = own + asked * [(a, b) for _, a, b in experts]
        known = sum(a * b for a, b in own) + bool(asked) * sum(n * a * b for n, a, b in experts)
        known += sum(module.weight.numel() for module in decoder.modules() if isinstance(module, torch.nn.Embedding))
        of_decoder = sum(weight.numel() for weight in decoder.parameters())
        adapter, rebuilt = sum(a + b for a, b, _ in adapted), 0
        parameters = sum(weight.numel() for weight in model.parameters())
        if experts and importlib.util.find_spec("peft"):
            adapter, rebuilt = _with_experts(model, targets)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            parameters=parameters,
            matrices=sum(a * b for a, b in shapes),
            head=text.vocab_size * text.hidden_size,
            flow=sum(a + b for a, b in shapes),
            cache=2 * text.num_hidden_layers * heads * width,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            queries=text.num_attention_heads * width,
            vocabulary=text.vocab_size,
            adapter=adapter,
            adapted_in=sum(a for a, _, module in adapted if module in within),
            adapted_out=max((b for _, b, module in adapted if module in within), default=0),
            rebuilt=rebuilt,
            unknown=of_decoder - known if of_decoder - known > 0.05 * of_decoder else 0,
        )


def _with_experts(model: Any, targets: str | list[str]) -> tuple[int, int]:
    """Trainable parameters of adapters of rank 1, and the weights of experts that get one, as peft makes them.

    Which experts get adapters depends on peft's version and the kind of model.
    """
    import torch

    from skillsd.engines.torch.models import add_lora

    with torch.device("meta"):
        wrapped = add_lora(model, LoraOptions(rank=1, alpha=1, target_modules=targets))
    trained = sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)
    bare: list[Any] = [module for module in wrapped.modules() if hasattr(module, "parameter_name")]
    return trained, sum(module.get_param().numel() for module in bare)


def _is_target(path: str, targets: str | list[str]) -> bool:
    """Whether peft adapts the module at `path`: a list has ends of paths, a string is a pattern for whole paths."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def read_architecture(name: str) -> Any:
    """The configuration of a model folder, a shipped model, a model in `PUBLISHED`, or one on the hub.

    Raises:
        UserError: if it can't be read.
    """
    from transformers import AutoConfig

    from skillsd.engines.torch.models import local_folder, resolve

    if name in PUBLISHED:
        return AutoConfig.for_model(**PUBLISHED[name])
    folder = local_folder(resolve(name))
    try:
        return AutoConfig.from_pretrained(folder or name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"can't read the model {name!r}: {str(error).splitlines()[0]} To estimate without it: model.name=FOLDER, a "
            "folder with its config.json (weights are not needed)"
        ) from error
