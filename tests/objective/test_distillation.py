"""Estimators of the divergence between student and teacher, against exact enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from small_vocabulary import (
    EXACT,
    SAMPLED,
    VOCAB,
    Batch,
    close,
    differ,
    enough,
    exact,
    expected,
    kl,
    log_policy,
    logits,
    naive_iw_k3,
)
from torch import Tensor

from skillsd.errors import UserError
from skillsd.objective import ESTIMATORS, WHOLE, Objective, TokenLogprobs, find_estimator, top_k

# -- the paper's estimator ------------------------------------------------------------------------------------------


@enough
@given(logits, logits, logits)
@pytest.mark.parametrize("name", ["iw_k3", "iw_k1", "reverse_kl"])
def test_mean_value_and_gradient_are_the_reverse_kls_on_and_off_policy(name, student, teacher, old):
    wanted, gradient = exact(student, teacher, reverse=True)
    for sampler in (student, old):
        value, surrogate_gradient = expected(name, student, teacher, sampler)
        close(value, wanted)
        close(surrogate_gradient, gradient)


# -- the stable form of its gradient --------------------------------------------------------------------------------


def gradients(logprob: Tensor, old: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """With respect to log pi: (our estimator's, the naive form's)."""
    ours = logprob.clone().requires_grad_()
    ESTIMATORS["iw_k3"].terms(TokenLogprobs(ours), TokenLogprobs(teacher), old).surrogate.sum().backward()
    naive = logprob.clone().requires_grad_()
    naive_iw_k3(naive, old, teacher).sum().backward()
    return ours.grad, naive.grad


@enough
@given(logits, logits, logits)
def test_surrogate_has_the_gradient_of_the_papers_loss_per_sample(student, teacher, old):
    p, q, o = log_policy(student), log_policy(teacher), log_policy(old)
    ours, naive = gradients(p, o, q)
    close(ours, naive)
    close(ours, (p - o).exp() * (p - q))


@pytest.mark.parametrize("log_ratio", [-20.0, -50.0])
def test_surrogate_is_exact_in_float32_where_autograd_through_the_value_is_not(log_ratio):
    logprob = torch.tensor([log_ratio - 1])
    ours, naive = gradients(logprob, logprob, torch.tensor([-1.0]))
    close(ours, torch.tensor([log_ratio]), 1e-6)
    assert abs(naive.item() - log_ratio) > 1


@pytest.mark.parametrize("log_ratio", [-10.0, -20.0, -50.0])
def test_surrogate_is_exact_in_bfloat16_where_autograd_through_the_value_is_not(log_ratio):
    logprob = torch.tensor([log_ratio - 1], dtype=torch.bfloat16)
    ours, naive = gradients(logprob, logprob, torch.tensor([-1.0], dtype=torch.bfloat16))
    assert ours.item() == log_ratio
    assert abs(naive.item() - log_ratio) >= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_rho", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("log_ratio", [-60.0, -20.0, -1.1, -0.9, -1e-3, 0.0, 1e-3, 1.0, 30.0])
def test_value_is_accurate(log_ratio, log_rho, dtype):
    # With rho as rounded to float32: the comparison is of the formula, not of the rounding of its inputs.
    logprob = torch.tensor([log_ratio - 2], dtype=dtype)
    teacher, old = torch.tensor([-2.0], dtype=dtype), logprob - log_rho
    value = ESTIMATORS["iw_k3"].terms(TokenLogprobs(logprob), TokenLogprobs(teacher), old).value
    ell, rho = float(logprob - teacher), math.exp(float(logprob - old))
    wanted = rho * (ell**2 / 2 - ell**3 / 6 if abs(ell) < 0.01 else math.exp(-ell) - 1 + ell)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(wanted, rel=1e-3, abs=1e-12)


def test_value_is_finite_where_rho_underflows_and_exp_of_the_log_ratio_overflows():
    # log pi = -120: exp(-l) alone overflows float32, rho alone underflows; together they are q / pi_old.
    terms = ESTIMATORS["iw_k3"].terms(
        TokenLogprobs(torch.tensor([-120.0])), TokenLogprobs(torch.tensor([-1.0])), torch.tensor([-2.0])
    )
    assert terms.value.item() == pytest.approx(math.e, rel=1e-5)


# -- the other estimators -------------------------------------------------------------------------------------------


@enough
@given(logits, logits)
def test_k3_on_policy_has_the_reverse_kls_value_and_the_forward_kls_gradient(student, teacher):
    value, gradient = expected("k3", student, teacher, student)
    close(value, exact(student, teacher, reverse=True)[0])
    close(gradient, exact(student, teacher, reverse=False)[1])


@enough
@given(logits, logits)
def test_k2_on_policy_has_the_reverse_kls_gradient(student, teacher):
    close(expected("k2", student, teacher, student)[1], exact(student, teacher, reverse=True)[1])


@enough
@given(logits, logits)
def test_k1_on_policy_has_the_reverse_kls_value_and_no_gradient(student, teacher):
    value, gradient = expected("k1", student, teacher, student)
    close(value, exact(student, teacher, reverse=True)[0])
    close(gradient, torch.zeros_like(gradient))


@enough
@given(logits, logits, logits)
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_plain_estimators_have_the_gradient_of_their_value_per_sample(name, student, teacher, old):
    p, q = log_policy(student), log_policy(teacher)
    value = {"k1": lambda r: r, "k2": lambda r: r**2 / 2, "k3": lambda r: (-r).exp() - 1 + r}[name]
    ours, autograd = p.clone().requires_grad_(), p.clone().requires_grad_()
    terms = ESTIMATORS[name].terms(TokenLogprobs(ours), TokenLogprobs(q), log_policy(old))
    terms.surrogate.sum().backward()
    value(autograd - q).sum().backward()
    close(terms.value, value(p - q))
    close(ours.grad, autograd.grad)


def test_estimators_without_rho_are_biased_off_policy():
    student, teacher, old = torch.eye(3, VOCAB, dtype=torch.float64) * 2
    gradient = exact(student, teacher, reverse=True)[1]
    assert differ(expected("k2", student, teacher, old)[1], gradient)
    assert differ(expected("k3", student, teacher, student)[1], gradient)


@enough
@given(logits, logits, logits)
def test_forward_kl_is_torchs_with_its_gradient(student, teacher, old):
    value, gradient = expected("forward_kl", student, teacher, old)
    wanted, wanted_gradient = exact(student, teacher, reverse=False)
    close(value, wanted)
    close(gradient, wanted_gradient)


@pytest.mark.parametrize("name", EXACT)
def test_tokens_of_zero_probability_contribute_nothing(name):
    theta = torch.tensor([[0.3, -0.2, -math.inf]], requires_grad=True)
    teacher = log_policy(torch.tensor([[1.0, 0.0, -math.inf]]))
    log_p = log_policy(theta)
    terms = ESTIMATORS[name].terms(
        TokenLogprobs(log_p[:, 0], log_p), TokenLogprobs(teacher[:, 0], teacher), log_p[:, 0].detach()
    )
    terms.surrogate.sum().backward()
    pair = (log_p.detach()[:, :2], teacher[:, :2])
    close(terms.value[0], kl(*(pair if name == "reverse_kl" else pair[::-1])), 1e-6)
    assert bool(theta.grad.isfinite().all())


@pytest.mark.parametrize("name", EXACT)
def test_missing_or_misshapen_distribution_is_an_error(name):
    chosen, whole = torch.zeros(2), torch.zeros(2, VOCAB)
    for teacher in (TokenLogprobs(chosen), TokenLogprobs(chosen, torch.zeros(2, 1))):
        with pytest.raises(ValueError, match="exact divergence"):
            ESTIMATORS[name].terms(TokenLogprobs(chosen, whole), teacher, chosen)


def test_exact_estimators_need_the_distribution():
    assert {name: ESTIMATORS[name].needs_distribution for name in ESTIMATORS} == (
        dict.fromkeys(SAMPLED, False) | dict.fromkeys(EXACT, True)
    )


@pytest.mark.parametrize("name", SAMPLED + EXACT)
@pytest.mark.parametrize(
    ("given_dtype", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_arithmetic_is_in_at_least_float32(name, given_dtype, wanted):
    whole = log_policy(torch.randn(2, VOCAB)).to(given_dtype)
    policy = TokenLogprobs(whole[:, 0], whole)
    terms = ESTIMATORS[name].terms(policy, policy, whole[:, 0])
    assert {terms.surrogate.dtype, terms.value.dtype} == {wanted}


# -- estimators from outside the package ----------------------------------------------------------------------------


@enough
@given(logits, logits, logits)
def test_estimator_given_as_module_and_attribute(student, teacher, old):
    """A sampled-token one: below the cap on rho it is iw_k3."""
    own = find_estimator("my_objective:clipped_iw_k3")
    assert not own.needs_distribution
    p, q, o = log_policy(student).requires_grad_(), log_policy(teacher), log_policy(old)
    terms = own.terms(TokenLogprobs(p), TokenLogprobs(q), o)
    terms.surrogate.sum().backward()
    weight = (p - o).detach().exp().clamp(max=1.0)
    close(p.grad, weight * (p - q).detach())
    papers = ESTIMATORS["iw_k3"].terms(TokenLogprobs(p), TokenLogprobs(q), o).value
    below = (p - o).detach() < 0
    close(terms.value[below], papers[below])


def test_objective_with_an_exact_estimator_of_ones_own():
    """It is differentiated by autograd, wants the distribution and may be combined with top_k."""
    name = "my_objective:half_total_variation"
    assert find_estimator(name).needs_distribution
    assert Objective(estimator=name).want == WHOLE
    assert Objective(estimator=name, top_k=3).want == top_k(3)
    batch = Batch.of(4)
    theta = batch.theta.clone().requires_grad_()
    difference = log_policy(theta).exp() - batch.signals["teacher_distribution"].exp()
    (difference.abs().sum(-1) / 2).mean().backward()
    _, gradient, metrics = batch.run(Objective(reward_weight=0.0, lambda_sdl=1.0, estimator=name))
    close(gradient, theta.grad)
    assert metrics["distil_value"].value == pytest.approx((difference.abs().sum(-1) / 2).mean().item())
    with pytest.raises(UserError, match="top_k is 3"):
        Objective(estimator="my_objective:clipped_iw_k3", top_k=3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("iw_k33", "iw_k3"),
        ("my_objective:nothing", "my_objective:nothing"),
        ("no_such_module:estimator", "no_such_module"),
        ("my_objective:not_an_estimator", "expected an Estimator.*sampled_token"),
    ],
)
def test_unknown_estimator_is_an_error(name, words):
    with pytest.raises(UserError, match=words):
        find_estimator(name)
    with pytest.raises(UserError, match=words):
        Objective(estimator=name)
