"""The objective against exact enumeration: expectations over a small vocabulary are summed, never sampled."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skillsd.errors import UserError
from skillsd.metrics import Mean, add_metrics
from skillsd.objective import (
    ESTIMATORS,
    Objective,
    TokenLogprobs,
    clipped_policy_loss,
    group_advantages,
    scheduled,
    truncated_importance,
)

VOCAB = 5
SAMPLED = ["iw_k3", "iw_k1", "k1", "k2", "k3"]
EXACT = ["reverse_kl", "forward_kl"]

enough = settings(max_examples=60, deadline=None)
logits = st.lists(st.floats(-4, 4), min_size=VOCAB, max_size=VOCAB).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def log_policy(values: Tensor) -> Tensor:
    return F.log_softmax(values, dim=-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) by torch: its arguments are (log b, log a)."""
    return F.kl_div(log_b, log_a, log_target=True, reduction="sum")


def expected(name: str, student: Tensor, teacher: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over y ~ pi_old of an estimator's value, and of its gradient with respect to the student's logits.

    One 'token' for each word of the vocabulary, weighted by how often pi_old samples it.
    """
    theta = student.clone().requires_grad_()
    log_p, log_q, log_old = log_policy(theta), log_policy(teacher), log_policy(old)
    rows = (VOCAB, VOCAB)
    terms = ESTIMATORS[name].terms(
        TokenLogprobs(log_p, log_p.expand(rows)), TokenLogprobs(log_q, log_q.expand(rows)), log_old
    )
    (log_old.exp() * terms.surrogate).sum().backward()
    return (log_old.exp() * terms.value).sum(), theta.grad


def exact(student: Tensor, teacher: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """KL and its gradient with respect to the student's logits, by autograd through torch's kl_div."""
    theta = student.clone().requires_grad_()
    log_p, log_q = log_policy(theta), log_policy(teacher)
    divergence = kl(log_p, log_q) if reverse else kl(log_q, log_p)
    divergence.backward()
    return divergence.detach(), theta.grad


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def differ(a: Tensor, b: Tensor, by: float = 1e-3) -> bool:
    return bool((a - b).abs().max() > by)


# ------------------------------------------------------------------------- identity 1: the paper's estimator


@enough
@given(logits, logits, logits)
@pytest.mark.parametrize("name", ["iw_k3", "iw_k1", "reverse_kl"])
def test_the_mean_is_the_reverse_kl_and_so_is_the_gradient_on_and_off_policy(name, student, teacher, old):
    wanted, gradient = exact(student, teacher, reverse=True)
    for sampler in (student, old):
        value, surrogate_gradient = expected(name, student, teacher, sampler)
        close(value, wanted)
        close(surrogate_gradient, gradient)


# -------------------------------------------------------------------- identity 2: the stable form's gradient


def naive_iw_k3(logprob: Tensor, old: Tensor, teacher: Tensor) -> Tensor:
    """L_SDL as the paper writes it, left to autograd."""
    log_ratio = logprob - teacher
    return (logprob - old.detach()).exp() * ((-log_ratio).exp() - 1 + log_ratio)


def gradients(logprob: Tensor, old: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """With respect to log pi: (ours, the naive one's)."""
    ours = logprob.clone().requires_grad_()
    ESTIMATORS["iw_k3"].terms(TokenLogprobs(ours), TokenLogprobs(teacher), old).surrogate.sum().backward()
    naive = logprob.clone().requires_grad_()
    naive_iw_k3(naive, old, teacher).sum().backward()
    return ours.grad, naive.grad


@enough
@given(logits, logits, logits)
def test_per_sample_the_surrogate_has_the_gradient_of_the_papers_loss(student, teacher, old):
    p, q, o = log_policy(student), log_policy(teacher), log_policy(old)
    ours, naive = gradients(p, o, q)
    close(ours, naive)
    close(ours, (p - o).exp() * (p - q))


@pytest.mark.parametrize("log_ratio", [-20.0, -50.0])
def test_in_float32_the_surrogate_is_right_where_autograd_through_the_value_is_not(log_ratio):
    logprob = torch.tensor([log_ratio - 1])
    ours, naive = gradients(logprob, logprob, torch.tensor([-1.0]))
    close(ours, torch.tensor([log_ratio]), 1e-6)
    assert abs(naive.item() - log_ratio) > 1


@pytest.mark.parametrize("log_ratio", [-10.0, -20.0, -50.0])
def test_in_bfloat16_the_surrogate_is_right_where_autograd_through_the_value_is_not(log_ratio):
    logprob = torch.tensor([log_ratio - 1], dtype=torch.bfloat16)
    ours, naive = gradients(logprob, logprob, torch.tensor([-1.0], dtype=torch.bfloat16))
    assert ours.item() == log_ratio
    assert abs(naive.item() - log_ratio) >= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_rho", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("log_ratio", [-60.0, -20.0, -1.1, -0.9, -1e-3, 0.0, 1e-3, 1.0, 30.0])
def test_the_value_keeps_its_digits(log_ratio, log_rho, dtype):
    # rho is taken as float32 has it, so that the comparison is of the formula and not of the inputs' rounding
    logprob = torch.tensor([log_ratio - 2], dtype=dtype)
    teacher, old = torch.tensor([-2.0], dtype=dtype), logprob - log_rho
    value = ESTIMATORS["iw_k3"].terms(TokenLogprobs(logprob), TokenLogprobs(teacher), old).value
    ell, rho = float(logprob - teacher), math.exp(float(logprob - old))
    wanted = rho * (ell**2 / 2 - ell**3 / 6 if abs(ell) < 0.01 else math.exp(-ell) - 1 + ell)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(wanted, rel=1e-3, abs=1e-12)


def test_the_value_is_finite_where_rho_underflows_and_the_teacher_is_far():
    # log pi = -120: exp(-l) alone overflows float32, rho alone underflows; together they are q / pi_old.
    terms = ESTIMATORS["iw_k3"].terms(
        TokenLogprobs(torch.tensor([-120.0])), TokenLogprobs(torch.tensor([-1.0])), torch.tensor([-2.0])
    )
    assert terms.value.item() == pytest.approx(math.e, rel=1e-5)


# -------------------------------------------------------------- identity 3, and what the other estimators do


@enough
@given(logits, logits)
def test_plain_k3_on_policy_has_the_reverse_kls_value_and_the_forward_kls_gradient(student, teacher):
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
def test_per_sample_the_plain_estimators_have_the_gradient_of_their_value(name, student, teacher, old):
    p, q = log_policy(student), log_policy(teacher)
    value = {"k1": lambda r: r, "k2": lambda r: r**2 / 2, "k3": lambda r: (-r).exp() - 1 + r}[name]
    ours, autograd = p.clone().requires_grad_(), p.clone().requires_grad_()
    terms = ESTIMATORS[name].terms(TokenLogprobs(ours), TokenLogprobs(q), log_policy(old))
    terms.surrogate.sum().backward()
    value(autograd - q).sum().backward()
    close(terms.value, value(p - q))
    close(ours.grad, autograd.grad)


def test_off_policy_without_rho_is_biased():
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
def test_tokens_ruled_out_by_both_count_for_nothing(name):
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
def test_a_missing_or_foreign_distribution_is_named(name):
    chosen, whole = torch.zeros(2), torch.zeros(2, VOCAB)
    for teacher in (TokenLogprobs(chosen), TokenLogprobs(chosen, torch.zeros(2, 1))):
        with pytest.raises(ValueError, match=name):
            ESTIMATORS[name].terms(TokenLogprobs(chosen, whole), teacher, chosen)


def test_the_registry_says_who_needs_the_distribution():
    assert {name: ESTIMATORS[name].needs_distribution for name in ESTIMATORS} == (
        dict.fromkeys(SAMPLED, False) | dict.fromkeys(EXACT, True)
    )


@pytest.mark.parametrize("name", SAMPLED + EXACT)
@pytest.mark.parametrize(
    ("given_dtype", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_arithmetic_is_float32_at_least(name, given_dtype, wanted):
    whole = log_policy(torch.randn(2, VOCAB)).to(given_dtype)
    policy = TokenLogprobs(whole[:, 0], whole)
    terms = ESTIMATORS[name].terms(policy, policy, whole[:, 0])
    assert {terms.surrogate.dtype, terms.value.dtype, terms.log_ratio.dtype} == {wanted}


# ------------------------------------------------------------------------------------------- the policy term


@enough
@given(logits, st.lists(st.floats(-3, 3), min_size=VOCAB, max_size=VOCAB))
def test_without_drift_the_gradient_is_the_policy_gradient(student, advantages):
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
        (1.5, 2.0, -1.3 * 2.0, 0.0),  # has gone far enough up: cut, at 1 + clip_high
        (0.5, 2.0, -0.5 * 2.0, -0.5 * 2.0),  # the wrong way: free to come back
        (1.5, -2.0, 1.5 * 2.0, 1.5 * 2.0),  # the wrong way: free to come back
        (0.5, -2.0, 0.9 * 2.0, 0.0),  # has gone far enough down: cut, at 1 - clip_low
        (1.1, 2.0, -1.1 * 2.0, -1.1 * 2.0),  # inside
        (1.5, 0.0, 0.0, 0.0),  # nothing to gain, nothing to clip
    ],
)
def test_clipping_in_every_case_of_sign_and_side(ratio, advantage, loss, gradient):
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


# ------------------------------------------------------------------------------------------------ advantages

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
def test_advantages_do_not_depend_on_the_rewards_scale_and_offset(values, scale, offset):
    assume(torch.tensor(values).std(correction=0) > 0.05)
    moved = [scale * value + offset for value in values]
    close(group_advantages(moved, eps=0.0), group_advantages(values, eps=0.0), 1e-6)


@pytest.mark.parametrize("values", [[0.7], [0.1, 0.1, 0.1], [1, 1, 1, 1, 1, 1, 1]])
def test_a_group_of_one_or_of_equals_has_no_advantages(values):
    assert group_advantages(values).tolist() == [0.0] * len(values)


def test_advantages_by_hand():
    close(group_advantages([0.0, 1.0]), torch.tensor([-1.0, 1.0], dtype=torch.float64), 1e-5)
    assert group_advantages([0.0, 1.0], scale_by_std=False).tolist() == [-0.5, 0.5]
    assert group_advantages([0.0, 1.0], eps=0.5).tolist() == [-0.5, 0.5]
    assert group_advantages(torch.tensor([0, 1]), eps=0.0).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("values", [[], [0.0, math.nan], [math.inf, 1.0], torch.zeros(2, 2)])
def test_what_is_not_a_list_of_finite_rewards_is_refused(values):
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(values)


# --------------------------------------------------------------------------- between two engines


@enough
@given(logits, logits, st.lists(st.floats(-3, 3), min_size=VOCAB, max_size=VOCAB), st.sampled_from([0.5, 2.0, 1e6]))
def test_weighted_tokens_of_the_sampler_give_the_trainers_policy_gradient(student, sampler, advantages, cap):
    """The mean over y ~ mu is that over y ~ min(pi_old, cap mu), which for a cap out of reach is pi_old."""
    theta, gains = student.clone().requires_grad_(), torch.tensor(advantages, dtype=torch.float64)
    log_p, log_mu = log_policy(theta), log_policy(sampler)
    mu = log_mu.exp()
    signals = {
        "old_logprobs": log_mu,
        "rescored_logprobs": log_p.detach(),
        "advantages": mu * gains,  # the loss is linear in the advantage: so each word counts as often as it is sampled
        "teacher_logprobs": torch.zeros(VOCAB),
        "has_teacher": torch.zeros(VOCAB, dtype=torch.bool),
    }
    counts = {"action_tokens": 1, "teacher_tokens": 0}
    loss, metrics = Objective(lambda_sdl=0.0, importance_cap=cap)(TokenLogprobs(log_p), signals, counts)
    loss.backward()
    other = student.clone().requires_grad_()
    target = torch.minimum(log_p.detach().exp(), cap * mu)
    (-(target * gains) * log_policy(other)).sum().backward()
    close(theta.grad, other.grad)
    weight = truncated_importance(log_p, log_mu, cap)
    close(weight, target / mu, 1e-6)
    assert not weight.requires_grad
    assert metrics["importance"].value == pytest.approx(weight.mean().item())
    assert metrics["importance_capped"].value == pytest.approx((weight >= cap).double().mean().item())
    if cap == 1e6:
        assert (mu * weight).sum().item() == pytest.approx(1)


def test_importance_is_of_the_policy_term_alone_and_off_by_default():
    batch = Batch.of(6)
    plain = batch.run(Objective(lambda_sdl=0.3))
    batch.signals["rescored_logprobs"] = batch.signals["old_logprobs"] + 0.1
    assert torch.equal(batch.run(Objective(lambda_sdl=0.3))[1], plain[1])
    distilled = [batch.run(Objective(reward_weight=0.0, lambda_sdl=1.0, importance_cap=c))[1] for c in (None, 0.1)]
    assert torch.equal(*distilled)
    batch.signals["rescored_logprobs"] = batch.signals["old_logprobs"]
    close(batch.run(Objective(lambda_sdl=0.3, importance_cap=2.0))[1], plain[1])  # engines that agree
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="importance_cap"):
            Objective(importance_cap=bad)


# --------------------------------------------------------------------------------------------- the objective


@dataclasses.dataclass
class Batch:
    """Random tokens of a student that has drifted from pi_old; `taught` of them have a teacher."""

    theta: Tensor  # [tokens, vocab]
    chosen: Tensor
    signals: dict[str, Tensor]

    @classmethod
    def of(cls, tokens: int, taught: list[bool] | None = None, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        theta, old, teacher = torch.randn(3, tokens, VOCAB, generator=generator, dtype=torch.float64)
        chosen = torch.randint(VOCAB, (tokens, 1), generator=generator)
        log_teacher = log_policy(teacher)
        signals = {
            "old_logprobs": log_policy(old).gather(1, chosen).squeeze(1),
            "advantages": torch.randn(tokens, generator=generator, dtype=torch.float64),
            "teacher_logprobs": log_teacher.gather(1, chosen).squeeze(1),
            "teacher_distribution": log_teacher,
            "has_teacher": torch.tensor([True] * tokens if taught is None else taught, dtype=torch.bool),
        }
        return cls(theta, chosen, signals)

    @property
    def counts(self) -> dict[str, float]:
        return {"action_tokens": len(self.theta), "teacher_tokens": int(self.signals["has_teacher"].sum())}

    def run(self, objective: Objective, parts: list[list[int]] | None = None):
        """Loss, gradient [tokens, vocab] and metrics, accumulated over the micro-batches `parts`."""
        theta = self.theta.clone().requires_grad_()
        total, metrics = 0.0, []
        for part in parts or [list(range(len(theta)))]:
            log_p = log_policy(theta[part])
            student = TokenLogprobs(log_p.gather(1, self.chosen[part]).squeeze(1), log_p)
            loss, figures = objective(student, {k: v[part] for k, v in self.signals.items()}, self.counts)
            loss.backward()
            total += loss.item()
            metrics.append(figures)
        return total, theta.grad, add_metrics(metrics)


def test_the_loss_is_the_weighted_sum_of_the_two_terms():
    batch = Batch.of(6, [True, True, False, True, False, False])
    whole = batch.run(Objective(reward_weight=0.7, lambda_sdl=0.3))[1]
    reward = batch.run(Objective(reward_weight=1.0, lambda_sdl=0.0))[1]
    teacher = batch.run(Objective(reward_weight=0.0, lambda_sdl=1.0))[1]
    close(whole, 0.7 * reward + 0.3 * teacher)
    assert reward.abs().max() > 0
    assert teacher.abs().max() > 0


@pytest.mark.parametrize("taught", [[True] * 6, [True, False, False, True, True, False]])
def test_the_distillation_is_the_papers_mean_over_the_action_tokens_that_have_a_teacher(taught):
    batch = Batch.of(6, taught)
    theta = batch.theta.clone().requires_grad_()
    logprobs = log_policy(theta).gather(1, batch.chosen).squeeze(1)
    terms = naive_iw_k3(logprobs, batch.signals["old_logprobs"], batch.signals["teacher_logprobs"])
    paper = terms[taught].mean()
    paper.backward()
    _, gradient, metrics = batch.run(Objective(reward_weight=0.0, lambda_sdl=1.0))
    close(gradient, theta.grad)
    assert metrics["distil_value"].value == pytest.approx(paper.item())
    assert metrics["teacher_k3"].value == pytest.approx(paper.item())


@enough
@given(st.data())
@pytest.mark.parametrize("name", SAMPLED + EXACT)
def test_the_gradient_is_the_same_however_the_batch_is_cut(name, data):
    tokens = data.draw(st.integers(1, 9))
    taught = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    home = data.draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens))
    batch = Batch.of(tokens, taught, seed=data.draw(st.integers(0, 99)))
    objective = Objective(lambda_sdl=0.5, estimator=name)
    loss, gradient, metrics = batch.run(objective)
    parts = [[i for i in range(tokens) if home[i] == k] for k in range(4)]  # empty ones too
    loss_cut, gradient_cut, metrics_cut = batch.run(objective, parts)
    assert loss_cut == pytest.approx(loss)
    close(gradient_cut, gradient)
    assert metrics_cut.keys() == metrics.keys()
    for key, mean in metrics.items():
        assert dataclasses.astuple(metrics_cut[key]) == pytest.approx(dataclasses.astuple(mean)), key


@pytest.mark.parametrize("name", SAMPLED + EXACT)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_where_there_is_no_teacher_changes_nothing(name, garbage):
    taught = [True, False, True, False]
    objective = Objective(reward_weight=0.0, lambda_sdl=1.0, estimator=name)
    clean, dirty = Batch.of(4, taught), Batch.of(4, taught)
    absent = ~dirty.signals["has_teacher"]
    dirty.signals["teacher_logprobs"][absent] = garbage
    dirty.signals["teacher_distribution"][absent] = garbage
    (loss, gradient, metrics), (loss_dirty, gradient_dirty, metrics_dirty) = (
        clean.run(objective),
        dirty.run(objective),
    )
    assert loss == loss_dirty
    assert torch.equal(gradient, gradient_dirty)
    assert metrics == metrics_dirty
    assert torch.equal(gradient[absent], torch.zeros_like(gradient[absent]))
    assert bool((gradient[~absent].abs().sum(1) > 0).all())
    assert metrics["teacher_log_ratio"].count == 2


@pytest.mark.parametrize("name", SAMPLED + EXACT)
def test_with_no_teacher_at_all_the_distillation_is_exactly_zero(name):
    batch = Batch.of(4, [False] * 4)
    batch.signals["teacher_logprobs"][:] = math.nan
    loss, gradient, metrics = batch.run(Objective(reward_weight=0.0, lambda_sdl=1.0, estimator=name))
    assert loss == 0.0
    assert not gradient.any()
    assert not [key for key in metrics if key.startswith(("teacher", "distil"))]


def test_lambda_zero_needs_no_distribution_and_still_reports_the_teacher():
    batch = Batch.of(4)
    del batch.signals["teacher_distribution"]
    objective = Objective(lambda_sdl=0.0, estimator="reverse_kl")
    assert not objective.needs_distribution
    assert dataclasses.replace(objective, lambda_sdl=0.1).needs_distribution
    assert not Objective().needs_distribution
    _, gradient, metrics = batch.run(objective)
    close(gradient, batch.run(Objective(lambda_sdl=0.0))[1])
    assert metrics["teacher_k3"].count == 4


def test_no_gradient_reaches_the_teacher_or_the_old_policy():
    batch = Batch.of(3)
    for name in ("old_logprobs", "teacher_logprobs", "teacher_distribution", "advantages"):
        batch.signals[name].requires_grad_()
    for name in ("iw_k3", "reverse_kl"):
        batch.run(Objective(lambda_sdl=1.0, estimator=name))
    assert all(signal.grad is None for signal in batch.signals.values())


@pytest.mark.parametrize("name", SAMPLED + EXACT)
def test_the_clamp_is_off_by_default_and_silences_and_counts_when_set(name):
    batch = Batch.of(8, [True] * 7 + [False])
    ratios = log_policy(batch.theta).gather(1, batch.chosen).squeeze(1) - batch.signals["teacher_logprobs"]
    far = (ratios.abs() > 1.0) & batch.signals["has_teacher"]
    assert 0 < far.sum() < 7
    free = Objective(reward_weight=0.0, lambda_sdl=1.0, estimator=name)
    clamped = dataclasses.replace(free, distil_clamp=1.0)
    _, gradient, metrics = batch.run(free)
    _, gradient_clamped, metrics_clamped = batch.run(clamped)
    assert free.distil_clamp is None
    assert metrics["distil_clamped"].total == 0
    assert metrics_clamped["distil_clamped"].total == far.sum()
    assert metrics_clamped["distil_clamped"].count == 7
    assert not gradient_clamped[far].any()
    # The denominator stays the tokens with a teacher: what is not silenced weighs what it did.
    assert torch.equal(gradient_clamped[~far], gradient[~far])
    assert bool((gradient[far].abs().sum(1) > 0).all())


def test_plain_k3_overflows_in_the_open_and_the_clamp_is_the_remedy():
    student = torch.tensor([-100.0, -1.0], requires_grad=True)
    signals = {
        "old_logprobs": student.detach(),
        "advantages": torch.zeros(2),
        "teacher_logprobs": torch.tensor([-1.0, -1.5]),
        "has_teacher": torch.tensor([True, True]),
    }
    counts = {"action_tokens": 2, "teacher_tokens": 2}
    for clamp in (None, 20.0):
        student.grad = None
        loss, _ = Objective(lambda_sdl=1.0, estimator="k3", distil_clamp=clamp)(TokenLogprobs(student), signals, counts)
        loss.backward()
        assert bool(student.grad.isfinite().all()) == (clamp is not None)


def test_the_metrics_are_what_they_are_called():
    batch = Batch.of(50)
    _, _, metrics = batch.run(Objective(clip_low=0.1, clip_high=0.3))
    log_p = log_policy(batch.theta)
    chosen = log_p.gather(1, batch.chosen).squeeze(1)
    ratio = (chosen - batch.signals["old_logprobs"]).exp()
    log_ratio = chosen - batch.signals["teacher_logprobs"]
    gain = batch.signals["advantages"]
    wanted = {
        "policy_loss": -torch.minimum(ratio * gain, ratio.clamp(0.9, 1.3) * gain),
        "ratio": ratio,
        "clip_fraction": (((ratio > 1.3) & (gain > 0)) | ((ratio < 0.9) & (gain < 0))).double(),
        "kl_old_new": ratio - 1 - ratio.log(),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "teacher_log_ratio": log_ratio,
        "teacher_log_ratio_square": log_ratio**2,
        "teacher_k3": ratio * ((-log_ratio).exp() - 1 + log_ratio),
        "distil_value": ratio * ((-log_ratio).exp() - 1 + log_ratio),
        "distil_clamped": torch.zeros(50),
    }
    assert metrics.keys() == wanted.keys()
    for name, x in wanted.items():
        assert metrics[name].value == pytest.approx(x.mean().item()), name
        seen = metrics[name].low, metrics[name].high
        assert seen == pytest.approx((x.min().item(), x.max().item())), name


@enough
@given(logits, logits)
def test_kl_old_new_is_the_kl_from_the_old_policy_to_the_new(student, old):
    log_p, log_old = log_policy(student), log_policy(old)
    total, counts = 0.0, {"action_tokens": 1, "teacher_tokens": 0}
    for y in range(VOCAB):
        signals = {
            "old_logprobs": log_old[[y]],
            "advantages": torch.zeros(1),
            "teacher_logprobs": torch.zeros(1),
            "has_teacher": torch.tensor([False]),
        }
        _, metrics = Objective()(TokenLogprobs(log_p[[y]]), signals, counts)
        total += log_old[y].exp().item() * metrics["kl_old_new"].value
    assert total == pytest.approx(kl(log_old, log_p).item(), abs=1e-9)


def test_entropy_is_absent_without_the_distribution():
    signals = {
        "old_logprobs": torch.zeros(1),
        "advantages": torch.zeros(1),
        "teacher_logprobs": torch.zeros(1),
        "has_teacher": torch.tensor([True]),
    }
    counts = {"action_tokens": 1, "teacher_tokens": 1}
    assert "entropy" not in Objective()(TokenLogprobs(torch.zeros(1)), signals, counts)[1]


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "teacher_logprobs", "has_teacher"])
def test_a_signal_off_by_an_axis_is_refused(name):
    batch = Batch.of(3)
    batch.signals[name] = batch.signals[name][:, None]
    with pytest.raises(ValueError, match=name):
        batch.run(Objective())


def test_a_local_count_in_place_of_the_global_one_is_noticed():
    batch = Batch.of(3)
    student = TokenLogprobs(log_policy(batch.theta)[:, 0])
    with pytest.raises(ValueError, match="teacher_tokens"):
        Objective()(student, batch.signals, {"action_tokens": 3, "teacher_tokens": 2})


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="iw_k3"):
        Objective(estimator="iw_k33")
    for name in ("reward_weight", "lambda_sdl", "clip_low", "clip_high", "distil_clamp"):
        for bad in (-0.1, math.nan):
            with pytest.raises(UserError, match=name):
                Objective(**{name: bad})


# --------------------------------------------------------------------------------- the schedule, the metrics


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [2.0, 2.0, 2.0, 2.0]),
        ("linear_decay", [2.0, 1.5, 1.0, 0.0]),
        ("cosine", [2.0, 1 + math.sqrt(0.5), 1.0, 0.0]),
    ],
)
def test_schedules(schedule, wanted):
    assert [scheduled(2.0, schedule, x) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(wanted)
    assert scheduled(2.0, schedule, 1.5) == scheduled(2.0, schedule, 1.0)


def test_an_unknown_schedule_is_named():
    with pytest.raises(UserError, match="linear_decay"):
        scheduled(1.0, "linear", 0.5)


def test_means_add_up():
    whole = add_metrics([{"a": Mean(2.0, 1, 2.0, 2.0)}, {}, {"a": Mean(1.0, 2, 0.0, 1.0), "b": Mean(1.0, 4)}])
    assert whole == {"a": Mean(3.0, 3, 0.0, 2.0), "b": Mean(1.0, 4)}
    assert whole["a"].value == 1.0
    assert math.isnan(Mean(0.0, 0).value)
