"""Coarse-grained distributions: how much of a divergence they keep, and their gradient at the limits of float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from skillsd.engines.top_k import coarse_grain, top_k
from skillsd.objective import Estimator, TokenLogprobs
from skillsd.objective.distillation import forward_kl, reverse_kl

VOCABULARY = 40
ESTIMATORS = [reverse_kl, forward_kl]


def _logits(rows: int, seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def _divergence(estimator: Estimator, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Of each row, with gradient."""
    none = torch.zeros(len(log_p), dtype=log_p.dtype)
    return estimator.terms(TokenLogprobs(none, log_p), TokenLogprobs(none, log_q), none).surrogate


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_coarse_divergence_grows_with_k_to_the_whole_one(estimator: Estimator) -> None:
    """Data processing inequality: the divergence over a finer partition is at least that over a coarser one."""
    logits = _logits(50, 0)
    # Close to each other, like student and teacher. Between unrelated distributions the teacher's top 20 of 40 miss a
    # third of the reverse KL, because much of the student's mass is in the teacher's tail.
    log_p, log_q = logits.log_softmax(-1), (logits + _logits(50, 1, scale=0.5)).log_softmax(-1)
    whole = _divergence(estimator, log_p, log_q)
    last = torch.zeros(50, dtype=torch.float64)
    errors = []
    for k in range(1, VOCABULARY):
        ids, coarse_q = top_k(log_q, k)
        value = _divergence(estimator, coarse_grain(log_p, ids), coarse_q)
        assert (value >= last - 1e-12).all()
        assert (value <= whole + 1e-12).all()
        errors.append(float((whole - value).mean()))
        last = value
    assert errors[0] > 10 * errors[20] > 0
    assert torch.allclose(last, whole, rtol=1e-12)  # the rest is one token


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_at_the_largest_k_is_that_of_the_whole_divergence(estimator: Estimator) -> None:
    logits, log_q = _logits(5, 0).requires_grad_(), _logits(5, 1).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    ids, coarse_q = top_k(log_q, VOCABULARY - 1)
    (ours,) = torch.autograd.grad(_divergence(estimator, coarse_grain(log_p, ids), coarse_q).sum(), logits)
    (whole,) = torch.autograd.grad(_divergence(estimator, logits.log_softmax(-1), log_q).sum(), logits)
    assert torch.allclose(ours, whole, rtol=1e-10, atol=1e-14)


def test_gradient_of_the_coarse_reverse_kl_by_hand() -> None:
    """d KL / d logit v = p(v) * (log P(c) / Q(c) - KL), with c the bucket of v, a candidate's own or the rest."""
    k = 6
    logits, log_q = _logits(5, 0).requires_grad_(), _logits(5, 1).log_softmax(-1)
    ids, coarse_q = top_k(log_q, k)
    coarse_p = coarse_grain(logits.log_softmax(-1), ids)
    value = _divergence(reverse_kl, coarse_p, coarse_q)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    p = logits.detach().softmax(-1)
    for row in range(5):
        bucket = {int(v): place for place, v in enumerate(ids[row])}
        ratio = (coarse_p - coarse_q)[row].detach()
        expected = [p[row, v] * (ratio[bucket.get(v, k)] - value[row].detach()) for v in range(VOCABULARY)]
        assert torch.allclose(gradient[row], torch.stack(expected), rtol=1e-10, atol=1e-14)


def test_gradient_agrees_with_finite_differences() -> None:
    ids = torch.tensor([[3, 0, 7], [1, 2, 39]])
    logits = _logits(2, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: coarse_grain(x.log_softmax(-1), ids), logits)


def test_the_rest_keeps_its_digits_where_it_is_tiny() -> None:
    """Computed as 1 - sum, it would be 0 or negative below 1e-7."""
    for gap in (10.0, 20.0, 60.0, 90.0, 200.0):
        logits = torch.full((1, VOCABULARY), -gap)
        logits[0, 4] = 0.0
        rest = coarse_grain(logits.log_softmax(-1), torch.tensor([[4]]))[0, 1].item()
        exact = math.log(VOCABULARY - 1) - gap - math.log1p((VOCABULARY - 1) * math.exp(-gap))
        assert rest == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gap", [20.0, 100.0, 1e4, math.inf])
def test_gradient_is_finite_where_the_candidates_hold_everything(estimator: Estimator, gap: float) -> None:
    """In float32, with a rest as small as 0 on both sides. Where it is 0, the whole divergence is the same."""
    k = 3
    bare = [_logits(4, seed, dtype=torch.float32) for seed in (0, 1)]
    for logits in bare:
        logits[:, k:] = -gap
    student = bare[0].requires_grad_()
    log_q = bare[1].log_softmax(-1)
    ids, coarse_q = top_k(log_q, k)
    assert sorted(ids[0].tolist()) == [0, 1, 2]
    value = _divergence(estimator, coarse_grain(student.log_softmax(-1), ids), coarse_q)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    whole = _divergence(estimator, student.log_softmax(-1), log_q)
    (expected,) = torch.autograd.grad(whole.sum(), student)
    assert gradient.isfinite().all()
    assert torch.allclose(value, whole, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_nan_is_not_taken_for_an_empty_rest() -> None:
    assert coarse_grain(torch.full((1, 5), math.nan), torch.tensor([[0, 1]])).isnan().all()


@pytest.mark.parametrize("k", [0, VOCABULARY, VOCABULARY + 1])
def test_k_is_checked(k: int) -> None:
    with pytest.raises(ValueError, match="whole distribution"):
        top_k(_logits(2, 0).log_softmax(-1), k)
