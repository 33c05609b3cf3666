"""Log-probs of chosen tokens and their gradients, against log-softmax and gather by autograd."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from skillsd.engines.torch import chosen

FORMS: dict[str, Any] = {"log-probs kept": chosen._LogprobsKept, "logits kept": chosen._LogitsKept}


def _both(form: Any, dtype: torch.dtype, temperature: float, *, vocabulary: int = 50, device: str = "cpu") -> Any:
    """Log-probs and gradients: ours, and those of autograd in float32."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(9, 53, generator=generator)).to(device, dtype)
    logits[2, 7] = -torch.inf  # some heads forbid tokens
    targets = torch.randint(0, vocabulary - 1, (9,), generator=generator).to(device)
    weights = torch.randn(9, generator=generator).to(device)
    ours, plain = logits.clone().requires_grad_(), logits.float().requires_grad_()
    found = form.apply(ours, targets, vocabulary, temperature)
    expected = torch.log_softmax(plain[:, :vocabulary] / temperature, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert found.dtype == torch.float32
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    return (found.detach(), ours.grad), (expected.detach(), plain.grad)


def _close(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert torch.allclose(ours[0], expected[0], rtol=1e-6, atol=1e-6)
    assert ours[1].dtype == dtype
    assert torch.allclose(ours[1].float(), expected[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [50, 53])
def test_values_and_gradients(form: str, temperature: float, dtype: torch.dtype, vocabulary: int) -> None:
    _close(*_both(FORMS[form], dtype, temperature, vocabulary=vocabulary), dtype)


def test_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "PIECE", 2 * 53)
    _close(*_both(chosen._LogitsKept, torch.float32, 0.7), torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_for_the_backward_pass(form: str) -> None:
    """One tensor of the logits' size, in their dtype if it is the logits."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    logits = torch.randn(20, 100, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        FORMS[form].apply(logits, torch.arange(20), 100, 1.0)
    assert sum(sizes) < 20 * 100 * {"log-probs kept": 4, "logits kept": 2}[form] + 20 * 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_compiled_on_a_gpu(
    temperature: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chosen, "COMPILE_FROM", 1)
    monkeypatch.setattr(chosen, "_failed", [])
    with caplog.at_level(logging.WARNING):
        for dtype in (torch.float32, torch.bfloat16):
            _close(*_both(chosen._LogitsKept, dtype, temperature, device="cuda"), dtype)
    assert not chosen._failed
