"""Losses as data: they travel to other processes, and take terms from outside the package."""

from __future__ import annotations

import dataclasses
import pickle

import my_objective
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_vocabulary import EXACT, SAMPLED, VOCAB, Batch, close, enough, log_policy, logits, masks

from skillsd.config import RunConfig
from skillsd.errors import UserError
from skillsd.objective import CHOSEN, WHOLE, Loss, LossTerm, Objective, TokenLogprobs, find_term, top_k

GATED = LossTerm("gated", 0.7, "teacher_mask", my_objective.gated_distillation)

# -- pickling -------------------------------------------------------------------------------------------------------

LOSSES = {
    **{name: Objective(lambda_sdl=0.5, estimator=name) for name in SAMPLED + EXACT},
    "top k": Objective(lambda_sdl=0.5, estimator="reverse_kl", top_k=VOCAB - 1),
    "own estimator": Objective(lambda_sdl=0.5, estimator="my_objective:half_total_variation"),
    "all settings": Objective(0.7, 0.5, "taught", 0.3, "k3", None, 0.1, 0.3, 1.0, 2.0, (GATED,)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("compare", [False, True])
def test_pickled_loss_gives_the_same_value_gradient_and_metrics(name: str, compare: bool) -> None:
    batch = Batch.of(7, [True, True, False, True, False, True, True]).imitate([4])
    batch.signals["rescored_logprobs"] = batch.signals["old_logprobs"] - 0.1
    loss = LOSSES[name].template.bind([batch.signals], compare_with_sampler=compare)
    again: Loss = pickle.loads(pickle.dumps(loss))
    assert again == loss
    value, gradient, metrics = batch.run(loss)
    value_again, gradient_again, metrics_again = batch.run(again)
    assert value_again == value
    assert torch.equal(gradient_again, gradient)
    assert metrics_again == metrics


# -- counts and log-probs that a loss needs -------------------------------------------------------------------------


def test_counts_are_those_of_the_masks_over_the_whole_minibatch() -> None:
    one, other = Batch.of(6, [True] * 4 + [False] * 2), Batch.of(3).imitate([0])
    loss = Objective().template.bind([one.signals, other.signals])
    assert loss.counts == {"action_mask": 8, "teacher_mask": 6, "imitation_mask": 1}
    term = LossTerm("extra", 1.0, "imitation_mask", my_objective.TermClass(), normaliser="teacher_mask")
    extra = Objective(reward_weight=0.0, lambda_sdl=0.0, extra_terms=(term,))
    value, _, _ = other.run(extra)
    chosen = other.student(other.theta, [0, 1, 2]).chosen
    assert value == pytest.approx(-chosen[0].item() / 2)  # one token imitated, two with a teacher


def test_distribution_is_wanted_only_if_there_is_a_teacher() -> None:
    taught, plain = Batch.of(3), Batch.of(3, [False] * 3)
    for objective, want in ((Objective(estimator="reverse_kl"), WHOLE), (Objective(), CHOSEN)):
        assert objective.template.bind([taught.signals, plain.signals]).want == want
        assert objective.template.bind([plain.signals]).want == CHOSEN
    assert Objective(estimator="reverse_kl", top_k=3).template.bind([taught.signals]).want == top_k(3)


def test_minibatch_without_a_terms_tokens_has_gradient_zero() -> None:
    batch = Batch.of(3).imitate([0, 1, 2])
    value, gradient, metrics = batch.run(Objective())
    assert value == 0
    assert not gradient.any()
    assert set(metrics) == {"imitation_loss"}


# -- a term from outside the package: a gate on |l| -----------------------------------------------------------------


def with_gate(weight: float = 1.0, **settings: float) -> Objective:
    """Nothing but the gated term, unless `settings` add more."""
    term = dataclasses.replace(GATED, weight=weight)
    return Objective(**{"reward_weight": 0.0, "lambda_sdl": 0.0, **settings}, extra_terms=(term,))


@enough
@given(logits, logits, logits)
def test_gated_terms_expected_gradient_is_that_of_the_gated_sum(student, teacher, old) -> None:
    """Over y ~ pi_old, by enumeration: the gradient of sum over y of gate(y) pi(y) (exp(-l) - 1 + l), gate constant."""
    theta = student.clone().requires_grad_()
    log_p, log_q, log_old = log_policy(theta), log_policy(teacher), log_policy(old)
    open_tokens = 0
    for y in range(VOCAB):
        signals = {
            "old_logprobs": log_old[[y]],
            "advantages": torch.zeros(1),
            "teacher_logprobs": log_q[[y]],
            **masks(1),
        }
        value, metrics = with_gate().template.bind([signals])(TokenLogprobs(log_p[[y]]), signals)
        (log_old[y].exp() * value).backward(retain_graph=True)
        open_tokens += metrics["gate_open"].value
    exact = student.clone().requires_grad_()
    log_p = log_policy(exact)
    log_ratio = log_p - log_q
    gate = log_ratio.detach().abs() < my_objective.THRESHOLD
    (gate * log_p.exp() * (torch.expm1(-log_ratio) + log_ratio)).sum().backward()
    close(theta.grad, exact.grad)
    assert open_tokens == gate.sum()


@enough
@given(st.data())
def test_gated_term_does_not_depend_on_micro_batches(data) -> None:
    """Its count, the tokens with a teacher, is derived from its mask."""
    tokens = data.draw(st.integers(1, 9))
    taught = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    home = data.draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens))
    batch = Batch.of(tokens, taught, seed=data.draw(st.integers(0, 99)))
    value, gradient, metrics = batch.run(with_gate())
    parts = [[i for i in range(tokens) if home[i] == k] for k in range(4)]
    cut_value, cut_gradient, cut_metrics = batch.run(with_gate(), parts)
    assert cut_value == pytest.approx(value)
    close(cut_gradient, gradient)
    assert cut_metrics.keys() == metrics.keys()
    every_token = batch.student(batch.theta, list(range(tokens)))
    log_ratio = every_token.chosen - batch.signals["teacher_logprobs"]
    rho = (every_token.chosen - batch.signals["old_logprobs"]).exp()
    weight = (log_ratio.abs() < my_objective.THRESHOLD) * rho * log_ratio * batch.signals["teacher_mask"]
    p = every_token.distribution
    assert p is not None
    grad_of_chosen = torch.nn.functional.one_hot(batch.chosen.squeeze(1), VOCAB) - p.exp()
    close(gradient, weight[:, None] * grad_of_chosen / max(1, sum(taught)))


def test_extra_term_is_added_to_the_objective_with_its_weight() -> None:
    batch = Batch.of(6, [True, True, False, True, False, True])
    with_all = batch.run(with_gate(0.7, reward_weight=1.0, lambda_sdl=0.3))
    own, gated = batch.run(Objective(lambda_sdl=0.3)), batch.run(with_gate())
    close(with_all[1], own[1] + 0.7 * gated[1])
    assert with_all[2] == {**own[2], "gate_open": gated[2]["gate_open"]}


def test_metric_of_a_term_that_returns_only_losses_has_its_name() -> None:
    batch = Batch.of(3)
    term = LossTerm("surprise", 1.0, "action_mask", my_objective.TermClass())
    metrics = batch.run(Objective(extra_terms=(term,)))[2]
    chosen = batch.student(batch.theta, [0, 1, 2]).chosen
    assert metrics["surprise"].value == pytest.approx(-chosen.mean().item())


def test_recipe_adds_a_term_by_name() -> None:
    """`objective.terms` names a function as module:function, or a class that is made without arguments."""
    section = {
        "name": "gated",
        "fn": "my_objective:gated_distillation",
        "weight": 0.7,
        "mask": "teacher_mask",
    }
    config = RunConfig.model_validate({"name": "x", "objective": {"terms": [section]}})
    [term] = [find_term(**term.model_dump()) for term in config.objective.terms]
    assert term == GATED
    made = find_term("surprise", "my_objective:TermClass", 1.0, "action_mask", "teacher_mask")
    assert isinstance(made.fn, my_objective.TermClass)
    assert made.counted == "teacher_mask"


@pytest.mark.parametrize("fn", ["my_objective:nothing", "no_such_module:fn", "my_objective:NOT_CALLABLE", "gated"])
def test_bad_term_function_is_an_error(fn: str) -> None:
    with pytest.raises(UserError, match=fn.partition(":")[0]):
        find_term("gated", fn, 1.0, "action_mask")
