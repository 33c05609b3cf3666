"""AdamW over float32 master weights keeps updates that bfloat16 alone would lose."""

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
    """Add a gradient, as a backward pass does."""
    (parameter * gradient.to(parameter.dtype)).sum().backward()


def _train(parameter: Tensor, optimiser: MasterAdamW, steps: int, learning_rate: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        _accumulate(parameter, torch.rand(parameter.shape, generator=generator) + 0.5)
        optimiser.step(learning_rate)
        optimiser.zero_grad()


def test_tiny_updates_add_up_in_bfloat16() -> None:
    """Hundreds of steps of 1e-5 add up to more than the resolution at 0.5; a single one is far below it."""
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
    # The spacing of bfloat16 numbers between 0.5 and 1 is 2**-8, so 4e-3 in all is about one such step.
    assert torch.equal(naive[5:], start[5:])  # plain AdamW does not move
    assert torch.equal(parameter, wide.to(torch.bfloat16))  # the float32 run, rounded
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
    """Micro-batches that nearly cancel, as with advantages of both signs: summed in bfloat16 they would be wrong."""
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


def test_frozen_weights_are_left_alone() -> None:
    frozen, trained = torch.ones(3), _parameter(torch.float32)
    optimiser = _adamw(frozen, trained)
    _train(trained, optimiser, 1, 0.01)
    assert torch.equal(frozen, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trips_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Moments, step count and masters, which have digits that the bfloat16 weights lack."""
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
