"""Tiny random models of many architectures, plain forward passes of them, and ways to look at an embedded engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from skillsd.engines.base import Engine, Sample, SampleRequest, StepReport, TokenSequence, Weights
from skillsd.engines.conformance import Check, SkippedCheck, Subject, kit, run_check
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.options import TorchOptions
from skillsd.engines.torch.sampling import choose
from skillsd.objective import WHOLE
from skillsd.warm_start.new_model import make_tokenizer

STOPS = tuple(range(10, 26))
"""Enough of them that a random model ends a turn now and then."""

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # Ten times the usual, or attention would hardly change a random model's output.
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
    """A model with its own eager attention and no KV cache: one sequence, one forward pass."""

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
        """Each token must be the one that the plain model gives after the same prefix, with the same random number.

        By induction, a loop of plain forward passes would have sampled the same. The check takes only one pass.
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


# -- an embedded engine ---------------------------------------------------------------------------------------------


def _no_engine(*, snapshot_teacher: bool = False, micro_batch_tokens: int = 8192) -> Engine:
    raise NotImplementedError("used for its test data only")


DATA = Subject(_no_engine)
"""Test data of the conformance checks."""


def embedded(folder: str | Path, **options: Any) -> Engine:
    """The embedded engine with a model folder, on the CPU."""
    engine = TorchEngine(str(folder), device="cpu", **options)
    return Engine(engine, engine, "torch", TorchOptions.capabilities)


def torch_engine(engine: Engine) -> TorchEngine:
    assert isinstance(engine.learner, TorchEngine)
    return engine.learner


def conforms(check: Check, subject: Subject) -> None:
    """Run a conformance check; a capability that the engine lacks skips the test."""
    try:
        run_check(check, subject)
    except SkippedCheck as skipped:
        pytest.skip(str(skipped))


def train(engine: Engine, steps: int = 1, **options: float) -> list[StepReport]:
    """A few steps on `DATA.batch()`, published to the sampler."""
    return asyncio.run(DATA.train(engine, steps, **options))


def view(engine: Engine, weights: Weights = "student") -> Tensor:
    """Log-probs ``[marked, vocab]`` of `DATA.sequences()`."""
    return asyncio.run(DATA.view(engine, weights))


def chosen(engine: Engine, sequences: Sequence[TokenSequence], **options: Any) -> list[Tensor]:
    """The chosen tokens' log-probs, ``[marked]`` for each sequence."""
    return asyncio.run(kit.chosen(engine.learner, sequences, **options))


def distribution(engine: Engine, sequence: TokenSequence, weights: Weights = "student") -> Tensor:
    """Log-probs ``[marked, vocab]`` of one sequence."""
    [found] = asyncio.run(engine.learner.logprobs([sequence], weights, want=WHOLE))
    return kit.distribution_of(found)


def sample_all(engine: Engine, requests: Sequence[SampleRequest]) -> list[Sample]:
    """All requests at once."""
    return asyncio.run(kit.sample_all(engine, requests))


def marked_all(tokens: Sequence[int]) -> TokenSequence:
    """Every token marked but the first."""
    return TokenSequence(tuple(tokens), (False, *[True] * (len(tokens) - 1)))


def assert_is_written(engine: Engine, folder: Path) -> None:
    """`folder` holds the student, as a model whose head is not tied to its embeddings."""
    plain = Plain(folder)
    model: Any = plain.model
    assert not model.config.tie_word_embeddings
    sequence = marked_all(DATA.ids(20, 0))
    assert kit.gap(distribution(engine, sequence), plain.logprobs(sequence.tokens)[:-1]) < 5e-5
