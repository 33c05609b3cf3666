"""AdamW over float32 masters: what bfloat16 alone would lose is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from skillsd.engines.torch.optimiser import MasterAdamW


def _parameter(dtype: torch.dtype, values: Tensor | None = None) -> Tensor:
    start = torch.linspace(0.1, 1.0, 10) if values is None else values
    return start.to(dtype).requires_grad_()


def _adamw(*parameters: Tensor, weight_decay: float = 0.0) -> MasterAdamW:
    return MasterAdamW(parameters, betas=(0.9, 0.95), weight_decay=weight_decay)


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """As a backward pass does."""
    (parameter * gradient.to(parameter.dtype)).sum().backward()


def _train(parameter: Tensor, optimiser: MasterAdamW, steps: int, learning_rate: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        _accumulate(parameter, torch.rand(parameter.shape, generator=generator) + 0.5)
        optimiser.step(learning_rate)
        optimiser.zero_grad()


def test_tiny_updates_add_up_in_bfloat16() -> None:
    """A hundred steps of 1e-5 each are well above the resolution at 0.5; one is far below it."""
    parameter = _parameter(torch.bfloat16)
    start = parameter.detach().clone()
    wide = start.float().requires_grad_()
    naive = start.clone().requires_grad_()
    for weights in (parameter, wide):
        _train(weights, _adamw(weights), 400, 1e-5)
    plain = torch.optim.AdamW([naive], lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(400):
        _accumulate(naive, torch.ones(10))
        plain.step()
        plain.zero_grad()
    # Bfloat16's spacing at 1 is 2**-7 below and 2**-8 above half of it: 4e-3 is a step or none for the largest.
    assert torch.equal(naive[5:], start[5:])  # plain AdamW stands still
    assert torch.equal(parameter, wide.to(torch.bfloat16))  # the nearest that bfloat16 has to the float32 run
    assert (parameter != start).sum() >= 8


def test_the_master_is_what_float32_training_gives() -> None:
    parameter = _parameter(torch.bfloat16)
    wide = parameter.detach().float().requires_grad_()
    ours, reference = (
        _adamw(parameter, weight_decay=0.1),
        torch.optim.AdamW([wide], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(10, generator=generator).bfloat16()
        _accumulate(parameter, gradient)
        wide.grad = gradient.float()
        ours.step(1e-3)
        reference.step()
        ours.zero_grad()
    assert torch.allclose(ours.masters[0], wide, rtol=0, atol=1e-7)
    assert torch.equal(parameter, ours.masters[0].bfloat16())


def test_gradients_are_summed_in_float32() -> None:
    """Micro-batches that nearly cancel, as advantages of both signs do: their sum in bfloat16 would be 0 or wrong."""
    parameter = _parameter(torch.bfloat16)
    optimiser = _adamw(parameter)
    parts = [torch.full((10,), value) for value in (256.0, 1.0, 0.5, -256.0)]
    naive = torch.zeros(10, dtype=torch.bfloat16)
    for part in parts:
        _accumulate(parameter, part)
        naive += part.bfloat16()
    assert not torch.equal(naive.float(), torch.full((10,), 1.5))
    assert torch.equal(optimiser.masters[0].grad, torch.full((10,), 1.5))  # type: ignore[arg-type]
    assert parameter.grad is None
    optimiser.zero_grad()
    assert optimiser.masters[0].grad is None


def test_float32_weights_have_no_copy() -> None:
    parameter = _parameter(torch.float32)
    optimiser = _adamw(parameter)
    assert optimiser.masters == [parameter] or optimiser.masters[0] is parameter
    assert optimiser.state_dict()["masters"] == []
    _train(parameter, optimiser, 1, 0.01)
    assert parameter.grad is None


def test_what_needs_no_gradient_is_left_alone() -> None:
    frozen, trained = torch.ones(3), _parameter(torch.float32)
    optimiser = _adamw(frozen, trained)
    _train(trained, optimiser, 1, 0.01)
    assert torch.equal(frozen, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_round_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Moments, step count and masters: the copies know digits that the bfloat16 weights do not."""
    through = _parameter(dtype)
    first = _adamw(through)
    _train(through, first, 7, 1e-4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = _parameter(dtype, through.detach().clone())
    second = _adamw(resumed)
    if dtype == torch.bfloat16:
        assert not torch.equal(second.masters[0], first.masters[0])
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(second.masters[0], first.masters[0])
    _train(through, first, 5, 1e-4, seed=1)
    _train(resumed, second, 5, 1e-4, seed=1)
    assert torch.equal(resumed, through)
    assert torch.equal(second.masters[0], first.masters[0])
