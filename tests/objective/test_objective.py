"""The objective: the sum of its terms, whatever the micro-batches."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_vocabulary import EXACT, SAMPLED, VOCAB, Batch, close, enough, log_policy, masks, naive_iw_k3

from skillsd.errors import UserError
from skillsd.objective import CHOSEN, SAMPLER_DIFF, WHOLE, Loss, Objective, TokenLogprobs, scheduled, top_k


def test_loss_is_the_weighted_sum_of_its_terms():
    batch = Batch.of(6, [True, True, False, True, False, False])
    whole = batch.run(Objective(reward_weight=0.7, lambda_sdl=0.3))[1]
    reward = batch.run(Objective(reward_weight=1.0, lambda_sdl=0.0))[1]
    teacher = batch.run(Objective(reward_weight=0.0, lambda_sdl=1.0))[1]
    close(whole, 0.7 * reward + 0.3 * teacher)
    assert reward.abs().max() > 0
    assert teacher.abs().max() > 0


@pytest.mark.parametrize(("normaliser", "count"), [("tokens", 6), ("taught", 3)])
def test_distillation_is_a_sum_over_tokens_with_a_teacher_over_one_count(normaliser, count):
    """``tokens``: the paper's 1/N, the same as for L_GRPO."""
    taught = [True, False, False, True, True, False]
    batch = Batch.of(6, taught)
    theta = batch.theta.clone().requires_grad_()
    logprobs = log_policy(theta).gather(1, batch.chosen).squeeze(1)
    terms = naive_iw_k3(logprobs, batch.signals["old_logprobs"], batch.signals["teacher_logprobs"])[taught]
    (terms.sum() / count).backward()
    _, gradient, metrics = batch.run(Objective(reward_weight=0.0, lambda_sdl=1.0, normaliser=normaliser))
    close(gradient, theta.grad)
    for name in ("distil_value", "teacher_k3"):  # logged as a mean over tokens with a teacher, whatever the count
        assert metrics[name].value == pytest.approx(terms.mean().item())


@enough
@given(st.data())
@pytest.mark.parametrize("name", SAMPLED + EXACT)
def test_lambda_under_taught_is_lambda_over_the_taught_share_under_tokens(name, data):
    taught = data.draw(st.lists(st.booleans(), min_size=1, max_size=9).filter(any))
    batch = Batch.of(len(taught), taught, seed=data.draw(st.integers(0, 99)))
    share = sum(taught) / len(taught)
    over_taught = batch.run(Objective(lambda_sdl=0.3, normaliser="taught", estimator=name))
    over_tokens = batch.run(Objective(lambda_sdl=0.3 / share, normaliser="tokens", estimator=name))
    assert over_taught[0] == pytest.approx(over_tokens[0])
    close(over_taught[1], over_tokens[1])


@enough
@given(st.data())
@pytest.mark.parametrize("name", SAMPLED + EXACT)
def test_gradient_does_not_depend_on_micro_batches(name, data):
    tokens = data.draw(st.integers(1, 9))
    taught = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    home = data.draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens))
    batch = Batch.of(tokens, taught, seed=data.draw(st.integers(0, 99)))
    batch.imitate(sorted(data.draw(st.sets(st.integers(0, tokens - 1)))))
    objective = Objective(lambda_sdl=0.5, estimator=name, imitation_weight=0.3)
    loss, gradient, metrics = batch.run(objective)
    parts = [[i for i in range(tokens) if home[i] == k] for k in range(4)]  # some are empty
    loss_cut, gradient_cut, metrics_cut = batch.run(objective, parts)
    assert loss_cut == pytest.approx(loss)
    close(gradient_cut, gradient)
    assert metrics_cut.keys() == metrics.keys()
    for key, mean in metrics.items():
        assert dataclasses.astuple(metrics_cut[key]) == pytest.approx(dataclasses.astuple(mean)), key


@pytest.mark.parametrize("name", SAMPLED + EXACT)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_signals_without_a_teacher_are_never_used(name, garbage):
    taught = [True, False, True, False]
    objective = Objective(reward_weight=0.0, lambda_sdl=1.0, estimator=name)
    clean, dirty = Batch.of(4, taught), Batch.of(4, taught)
    absent = ~dirty.signals["teacher_mask"]
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
def test_distillation_is_exactly_zero_without_a_teacher(name):
    batch = Batch.of(4, [False] * 4)
    batch.signals["teacher_logprobs"][:] = math.nan
    loss, gradient, metrics = batch.run(Objective(reward_weight=0.0, lambda_sdl=1.0, estimator=name))
    assert loss == 0.0
    assert not gradient.any()
    assert not [key for key in metrics if key.startswith(("teacher", "distil"))]


def test_lambda_zero_needs_no_distribution_and_still_logs_the_teacher():
    batch = Batch.of(4)
    del batch.signals["teacher_distribution"]
    objective = Objective(lambda_sdl=0.0, estimator="reverse_kl")
    assert objective.want == CHOSEN
    assert dataclasses.replace(objective, lambda_sdl=0.1).want == WHOLE
    assert dataclasses.replace(objective, lambda_sdl=0.1, top_k=7).want == top_k(7)
    assert Objective().want == CHOSEN
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
def test_clamp_is_off_by_default_and_zeroes_and_counts_tokens_when_set(name):
    batch = Batch.of(8, [True] * 7 + [False])
    ratios = log_policy(batch.theta).gather(1, batch.chosen).squeeze(1) - batch.signals["teacher_logprobs"]
    far = (ratios.abs() > 1.0) & batch.signals["teacher_mask"]
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
    # The denominator is still the number of tokens with a teacher: the others' gradient does not change.
    assert torch.equal(gradient_clamped[~far], gradient[~far])
    assert bool((gradient[far].abs().sum(1) > 0).all())


def test_k3_overflows_visibly_unless_clamped():
    student = torch.tensor([-100.0, -1.0], requires_grad=True)
    signals = {
        "old_logprobs": student.detach(),
        "advantages": torch.zeros(2),
        "teacher_logprobs": torch.tensor([-1.0, -1.5]),
        **masks(2),
    }
    for clamp in (None, 20.0):
        student.grad = None
        loss = Objective(lambda_sdl=1.0, estimator="k3", distil_clamp=clamp).template.bind([signals])
        value, _ = loss(TokenLogprobs(student), signals)
        value.backward()
        assert bool(student.grad.isfinite().all()) == (clamp is not None)


def test_metrics_by_name():
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


def test_no_entropy_without_the_whole_distribution():
    batch = Batch.of(3)
    loss = Objective().template.bind([batch.signals])
    student = batch.student(batch.theta, [0, 1, 2])
    coarse = dataclasses.replace(student, candidates=torch.zeros(3, VOCAB - 1, dtype=torch.int64))
    assert "entropy" in loss(student, batch.signals)[1]
    for less in (TokenLogprobs(student.chosen), coarse):
        assert "entropy" not in loss(less, batch.signals)[1]


def test_imitated_tokens_have_no_part_in_the_other_terms():
    batch = Batch.of(6).imitate([1, 4])
    others = [0, 2, 3, 5]
    theta = batch.theta.clone().requires_grad_()
    nll = -batch.student(theta, [1, 4]).chosen.mean()
    (0.5 * nll).backward()
    _, gradient, metrics = batch.run(Objective(lambda_sdl=0.3, imitation_weight=0.5))
    close(gradient[[1, 4]], theta.grad[[1, 4]])
    assert metrics["imitation_loss"].value == pytest.approx(nll.item())
    assert metrics["policy_loss"].count == metrics["teacher_k3"].count == 4
    alone = Batch(batch.theta[others], batch.chosen[others], batch.part(others))
    close(gradient[others], alone.run(Objective(lambda_sdl=0.3))[1])


def test_difference_from_the_sampler_is_logged_for_action_tokens_if_asked():
    batch = Batch.of(6).imitate([1, 4])
    template = Objective().template
    student = batch.student(batch.theta, list(range(6)))
    assert SAMPLER_DIFF not in template.bind([batch.signals])(student, batch.signals)[1]
    compared = template.bind([batch.signals], compare_with_sampler=True)(student, batch.signals)[1][SAMPLER_DIFF]
    own = batch.signals["action_mask"]
    expected = (student.chosen - batch.signals["old_logprobs"])[own].abs()
    assert compared.count == 4
    assert compared.high == expected.max().item()
    part = [1, 4]  # a micro-batch without action tokens leaves the metric out
    rest = template.bind([batch.signals], compare_with_sampler=True)(batch.student(batch.theta, part), batch.part(part))
    assert SAMPLER_DIFF not in rest[1]


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "teacher_logprobs", "teacher_mask"])
def test_signal_with_an_extra_axis_is_an_error(name):
    batch = Batch.of(3)
    loss = Objective().template.bind([batch.signals])
    batch.signals[name] = batch.signals[name][:, None]
    with pytest.raises(ValueError, match=name):
        loss(batch.student(batch.theta, [0, 1, 2]), batch.signals)


@pytest.mark.parametrize(
    ("normaliser", "name", "term"), [("tokens", "action_mask", "policy"), ("taught", "teacher_mask", "distillation")]
)
def test_count_smaller_than_the_micro_batch_is_an_error(normaliser, name, term):
    """The count of a micro-batch in place of that of the minibatch would scale the gradient."""
    batch = Batch.of(3)
    whole = Objective(normaliser=normaliser).template.bind([batch.signals])
    local = Loss(whole.terms, {**whole.counts, name: 2})
    with pytest.raises(ValueError, match=f"{term}: 3 tokens of {name}"):
        batch.run(local)


def test_bad_setting_is_named():
    for name in ("reward_weight", "lambda_sdl", "imitation_weight", "clip_low", "clip_high", "distil_clamp"):
        for bad in (-0.1, math.nan):
            with pytest.raises(UserError, match=name):
                Objective(**{name: bad})


# -- schedules ------------------------------------------------------------------------------------------------------


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


def test_unknown_schedule_is_an_error():
    with pytest.raises(UserError, match="linear_decay"):
        scheduled(1.0, "linear", 0.5)
