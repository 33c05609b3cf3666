"""Tiny random models of many architectures, and what they compute without any of the engine's tricks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from skillsd.engines.base import Sample, SampleRequest
from skillsd.engines.torch.sampler import choose
from skillsd.warm_start.new_model import make_tokenizer

STOPS = tuple(range(10, 26))
"""Enough of them that a random model ends a turn now and then."""

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # Ten times the usual, or attention would hardly matter to what a random model says.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "llama-untied": ("Llama", {**GROUPED, "tie_word_embeddings": False, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", GROUPED),
    "qwen2-window": (
        "Qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "mistral-window": ("Mistral", {**GROUPED, "sliding_window": 7}),
    "gemma3": (
        "Gemma3Text",
        {**GROUPED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2", SIZES),  # with its usual dropout of 0.1
    "gpt-neox": ("GPTNeoX", SIZES),
    "deepseek-v3": (  # latent attention: keys and values of different widths
        "DeepseekV3",
        {
            **SIZES,
            **dict.fromkeys(("num_key_value_heads", "n_routed_experts", "qk_rope_head_dim", "qk_nope_head_dim"), 4),
            **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 6},
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


@cache
def tokenizer() -> Any:
    return make_tokenizer([" a b c d e f"] * 3, 300)


def write(folder: Path, kind: str, options: dict[str, Any]) -> Path:
    """A random model of the config class `kind`, with a tokenizer, in `folder`."""
    config = getattr(transformers, f"{kind}Config")(**{"vocab_size": len(tokenizer()), **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=list(STOPS), pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Plain:
    """A model with its own eager attention and nothing kept: one sequence, one forward pass."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """``[tokens, vocabulary]``; row i predicts token i + 1."""
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    def logprobs(self, tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
        return (self.logits(tokens).float() / temperature).log_softmax(-1)

    def check(self, request: SampleRequest, sample: Sample, tolerance: float = 1e-5) -> None:
        """Each token must be the one that the plain model gives with the same random number after the same prefix.

        By induction that is what a loop of plain forward passes would have sampled; it takes only one of them.
        """
        count, before = len(sample.tokens), len(request.tokens)
        rows = self.logits((*request.tokens, *sample.tokens))[before - 1 : before - 1 + count]
        rng = random.Random(request.seed)
        expected, logprobs = choose(rows, [request.temperature] * count, [rng.random() for _ in range(count)])
        assert list(sample.tokens) == expected
        assert torch.allclose(torch.tensor(sample.logprobs), torch.tensor(logprobs), rtol=0, atol=tolerance)
        assert not set(sample.tokens[:-1]) & set(STOPS)
        if sample.stop_reason == "stop":
            assert sample.tokens[-1] in STOPS
        else:
            assert sample.stop_reason == "length"
            assert count == request.max_tokens
            assert sample.tokens[-1] not in STOPS
