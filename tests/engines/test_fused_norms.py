"""RMSNorms by torch's own function: the same result up to rounding, or left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.schedules import ids
from skillsd.engines.torch.fused_norms import fuse_norms


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "norms"), [("llama", 5), ("qwen3", 9), ("mistral-window", 5), ("gemma3", 0), ("gpt2", 0)]
)
def test_log_probs_and_gradients_stay(name: str, norms: int, dtype: str, model_folder: Callable[[str], Path]) -> None:
    """Gemma's norms, which multiply by ``1 + weight``, are not RMSNorm as torch has it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=getattr(torch, dtype)).eval()
    tokens = torch.tensor([ids(60, 0)])

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        logprobs = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
        (-logprobs.gather(1, tokens.T).mean()).backward()
        return logprobs.detach(), torch.cat(
            [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        )

    with torch.no_grad():  # weights of 1 would hide a missing multiplication
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)).to(parameter))
    expected, gradient = run()
    assert fuse_norms(model) == norms
    found, its_gradient = run()
    tolerance = 1e-5 if dtype == "float32" else 0.03
    kl = (expected.exp() * (expected - found)).sum(-1).max()
    assert abs(kl) < tolerance
    assert (its_gradient - gradient).norm() < 3 * tolerance * gradient.norm()


def test_weights_given_for_a_call_are_used(model_folder: Callable[[str], Path]) -> None:
    """A teacher's own norm weights replace the student's for a call."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama")).eval()
    fuse_norms(model)
    doubled = {"model.norm.weight": 2 * model.model.norm.weight.detach()}
    inputs = {"input_ids": torch.tensor([ids(5, 0)]), "use_cache": False}
    with torch.inference_mode():
        plain = model(**inputs).logits
        assert torch.allclose(torch.func.functional_call(model, doubled, (), inputs).logits, 2 * plain, rtol=1e-5)
