"""The policy term: clipped surrogate, group-relative advantages, importance weights between two engines."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from small_vocabulary import VOCAB, Batch, close, enough, kl, log_policy, logits, masks

from skillsd.errors import UserError
from skillsd.objective import Objective, TokenLogprobs, clipped_policy_loss, group_advantages, truncated_importance

# -- the clipped surrogate ------------------------------------------------------------------------------------------


@enough
@given(logits, st.lists(st.floats(-3, 3), min_size=VOCAB, max_size=VOCAB))
def test_gradient_on_policy_is_the_policy_gradient(student, advantages):
    gains = torch.tensor(advantages, dtype=torch.float64)
    theta = student.clone().requires_grad_()
    log_p = log_policy(theta)
    terms = clipped_policy_loss(log_p, log_p, gains, clip_low=0.2, clip_high=0.2)
    (log_p.detach().exp() * terms.loss).sum().backward()
    direct = student.clone().requires_grad_()
    (-(log_policy(direct).exp() * gains).sum()).backward()  # J = E_pi[A]
    close(theta.grad, direct.grad)
    assert not terms.clipped.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2.0, -1.3 * 2.0, 0.0),  # above 1 + clip_high: clipped
        (0.5, 2.0, -0.5 * 2.0, -0.5 * 2.0),  # the wrong direction: not clipped
        (1.5, -2.0, 1.5 * 2.0, 1.5 * 2.0),  # the wrong direction: not clipped
        (0.5, -2.0, 0.9 * 2.0, 0.0),  # below 1 - clip_low: clipped
        (1.1, 2.0, -1.1 * 2.0, -1.1 * 2.0),  # inside
        (1.5, 0.0, 0.0, 0.0),  # no advantage: no gradient, and not counted as clipped
    ],
)
def test_clipping_by_sign_and_side(ratio, advantage, loss, gradient):
    logprob = torch.tensor([math.log(ratio) - 3], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-3.0], dtype=torch.float64)
    terms = clipped_policy_loss(
        logprob, old, torch.tensor([advantage], dtype=torch.float64), clip_low=0.1, clip_high=0.3
    )
    terms.loss.sum().backward()
    assert terms.loss.item() == pytest.approx(loss)
    assert logprob.grad.item() == pytest.approx(gradient)
    assert terms.ratio.item() == pytest.approx(ratio)
    assert not terms.ratio.requires_grad
    assert terms.clipped.item() == (gradient == 0 and advantage != 0)


# -- advantages -----------------------------------------------------------------------------------------------------

rewards = st.lists(st.floats(0, 1), min_size=1, max_size=9)


@enough
@given(rewards)
def test_advantages_have_mean_zero_and_at_most_unit_scale(values):
    advantages = group_advantages(values)
    assert abs(advantages.mean().item()) < 1e-8
    assert advantages.square().mean().item() <= 1 + 1e-9
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert all(advantages[a] <= advantages[b] for a, b in pairwise(order))


@enough
@given(rewards, st.floats(0.5, 20), st.floats(-5, 5))
def test_advantages_are_invariant_to_the_rewards_scale_and_offset(values, scale, offset):
    assume(torch.tensor(values).std(correction=0) > 0.05)
    moved = [scale * value + offset for value in values]
    close(group_advantages(moved, eps=0.0), group_advantages(values, eps=0.0), 1e-6)


@pytest.mark.parametrize("values", [[0.7], [0.1, 0.1, 0.1], [1, 1, 1, 1, 1, 1, 1]])
def test_group_of_one_or_of_equal_rewards_has_zero_advantages(values):
    assert group_advantages(values).tolist() == [0.0] * len(values)


def test_advantages_by_hand():
    close(group_advantages([0.0, 1.0]), torch.tensor([-1.0, 1.0], dtype=torch.float64), 1e-5)
    assert group_advantages([0.0, 1.0], scale_by_std=False).tolist() == [-0.5, 0.5]
    assert group_advantages([0.0, 1.0], eps=0.5).tolist() == [-0.5, 0.5]
    assert group_advantages(torch.tensor([0, 1]), eps=0.0).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("values", [[], [0.0, math.nan], [math.inf, 1.0], torch.zeros(2, 2)])
def test_rewards_must_be_a_list_of_finite_numbers(values):
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(values)


# -- importance weights between two engines -------------------------------------------------------------------------


@enough
@given(logits, logits, st.lists(st.floats(-3, 3), min_size=VOCAB, max_size=VOCAB), st.sampled_from([0.5, 2.0, 1e6]))
def test_importance_weighted_gradient_is_the_trainers_policy_gradient(student, sampler, advantages, cap):
    """The mean over y ~ mu is that over y ~ min(pi_old, cap * mu), which is pi_old if the cap is never reached."""
    theta, gains = student.clone().requires_grad_(), torch.tensor(advantages, dtype=torch.float64)
    log_p, log_mu = log_policy(theta), log_policy(sampler)
    mu = log_mu.exp()
    signals = {
        "old_logprobs": log_mu,
        "rescored_logprobs": log_p.detach(),
        "advantages": mu * gains,  # the loss is linear in the advantage, so this weights each token by its probability
        "teacher_logprobs": torch.zeros(VOCAB),
        **masks(VOCAB, teacher=False),
    }
    loss = Objective(lambda_sdl=0.0, importance_cap=cap).template.bind([signals])
    value, metrics = loss(TokenLogprobs(log_p), signals)
    value.backward()
    other = student.clone().requires_grad_()
    target = torch.minimum(log_p.detach().exp(), cap * mu)
    (-(target * gains) * log_policy(other)).sum().backward()
    close(theta.grad * VOCAB, other.grad)  # the loss divides by the number of tokens
    weight = truncated_importance(log_p, log_mu, cap)
    close(weight, target / mu, 1e-6)
    assert not weight.requires_grad
    assert metrics["importance"].value == pytest.approx(weight.mean().item())
    assert metrics["importance_capped"].value == pytest.approx((weight >= cap).double().mean().item())
    if cap == 1e6:
        assert (mu * weight).sum().item() == pytest.approx(1)


def test_importance_affects_the_policy_term_only_and_is_off_by_default():
    batch = Batch.of(6)
    plain = batch.run(Objective(lambda_sdl=0.3))
    batch.signals["rescored_logprobs"] = batch.signals["old_logprobs"] + 0.1
    assert torch.equal(batch.run(Objective(lambda_sdl=0.3))[1], plain[1])
    distilled = [batch.run(Objective(reward_weight=0.0, lambda_sdl=1.0, importance_cap=c))[1] for c in (None, 0.1)]
    assert torch.equal(*distilled)
    batch.signals["rescored_logprobs"] = batch.signals["old_logprobs"]
    close(batch.run(Objective(lambda_sdl=0.3, importance_cap=2.0))[1], plain[1])  # the two engines agree
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="importance_cap"):
            Objective(importance_cap=bad)


@enough
@given(logits, logits)
def test_kl_old_new_is_the_kl_from_the_old_policy_to_the_new(student, old):
    log_p, log_old = log_policy(student), log_policy(old)
    total = 0.0
    for y in range(VOCAB):
        signals = {
            "old_logprobs": log_old[[y]],
            "advantages": torch.zeros(1),
            "teacher_logprobs": torch.zeros(1),
            **masks(1, teacher=False),
        }
        _, metrics = Objective().template.bind([signals])(TokenLogprobs(log_p[[y]]), signals)
        total += log_old[y].exp().item() * metrics["kl_old_new"].value
    assert total == pytest.approx(kl(log_old, log_p).item(), abs=1e-9)
