"""The algebra of a loss as one datum or by the general route, by exact enumeration in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skillsd.engines.base import Loss, TokenSequence, TrainItem
from skillsd.engines.tinker.gradient import Share, gradient, sampled_by_student
from skillsd.objective import ACTION_MASK, IMITATION_MASK, TEACHER_MASK, LossTemplate, Objective, TokenLogprobs

LETTERS = 6


def logits(seed: int) -> Tensor:
    return torch.randn(LETTERS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum()


def items_of(old: Tensor, teacher: Tensor, advantages: Tensor, taught: Tensor) -> list[TrainItem]:
    count = len(old)
    signals = {
        "old_logprobs": old,
        "advantages": advantages,
        "teacher_logprobs": teacher,
        ACTION_MASK: torch.ones(count, dtype=torch.bool),
        TEACHER_MASK: taught,
        IMITATION_MASK: torch.zeros(count, dtype=torch.bool),
    }
    return [TrainItem(TokenSequence(tuple(range(count + 1)), (False, *[True] * count)), signals)]


def bound(template: LossTemplate, items: list[TrainItem], *, on_policy: bool = False) -> Loss:
    return template.bind((item.signals for item in items), compare_with_sampler=on_policy)


def server_gradient(shares: list[Share], z: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
    """What the protocol's importance_sampling does to the logits, each token weighted with its probability."""
    [share] = shares
    logprobs = z.log_softmax(-1)[tokens]
    loss = -(weights * (logprobs - share.logprobs).exp() * share.advantages).sum()
    return torch.autograd.grad(loss, z, retain_graph=True)[0]


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_one_datum_is_the_kl_gradient_on_policy_only(drift: float) -> None:
    """Over all letters: on policy the mean gradient is grad KL(pi || q), off policy it lacks grad KL(pi || pi_old)."""
    old, teacher = logits(1).log_softmax(-1), logits(2).log_softmax(-1)
    z = (old + drift * logits(3)).requires_grad_()
    letters = torch.arange(LETTERS)
    items = items_of(old, teacher, torch.zeros(LETTERS), torch.ones(LETTERS, dtype=torch.bool))
    loss = bound(Objective(reward_weight=0.0, lambda_sdl=float(LETTERS)).template, items, on_policy=True)
    known = sampled_by_student(items, loss)
    assert known is not None
    one_datum = server_gradient(gradient(items, loss, known).shares, z, old.exp(), letters)
    today = [z.detach().log_softmax(-1)]
    general = server_gradient(gradient(items, loss, today).shares, z, old.exp(), letters)
    pi = z.log_softmax(-1)
    exact = torch.autograd.grad(kl(pi, teacher), z, retain_graph=True)[0]
    lacking = torch.autograd.grad(kl(pi, old), z, retain_graph=True)[0]
    assert torch.allclose(general, exact, atol=1e-12)
    assert torch.allclose(one_datum, exact - lacking, atol=1e-12)
    assert (bool((one_datum - exact).norm() > 0.1 * exact.norm())) == (drift > 0)


def random_items(count: int = 200) -> tuple[list[TrainItem], Tensor]:
    generator = torch.Generator().manual_seed(5)

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    old = -3 * uniform()
    items = items_of(old, -3 * uniform(), 4 * uniform() - 2, uniform() < 0.7)
    return items, old + 0.3 * (uniform() - 0.5)


OBJECTIVES = {
    "skill-sd": Objective(lambda_sdl=0.3),
    "taught": Objective(lambda_sdl=0.3, normaliser="taught"),
    "k2": Objective(lambda_sdl=0.3, estimator="k2"),
    "clamped": Objective(lambda_sdl=0.3, distil_clamp=0.5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_general_route_is_exact_for_every_loss_on_sampled_tokens(name: str) -> None:
    items, today = random_items()
    loss = bound(OBJECTIVES[name].template, items)
    leaf = today.clone().requires_grad_()
    value, _ = loss(TokenLogprobs(leaf), items[0].signals)
    (expected,) = torch.autograd.grad(value, leaf)
    found = gradient(items, loss, [today])
    [share] = found.shares
    assert found.finite
    assert torch.equal(share.logprobs, today)  # rho is 1 at the server
    assert torch.allclose(-share.advantages, expected, atol=1e-15)


def test_one_datum_has_the_advantages_of_the_equation_and_is_wrong_off_policy() -> None:
    items, today = random_items()
    signals = items[0].signals
    n = len(today)
    loss = bound(Objective(lambda_sdl=0.3).template, items, on_policy=True)
    old = signals["old_logprobs"]
    [share] = gradient(items, loss, [old]).shares
    a = signals["advantages"] / n - 0.3 / n * signals[TEACHER_MASK] * (old - signals["teacher_logprobs"])
    assert torch.allclose(share.advantages, a, atol=1e-15)
    rho = (today - old).exp()
    [exact] = gradient(items, loss, [today]).shares
    assert (rho * share.advantages - exact.advantages).norm() > 0.01 * exact.advantages.norm()


def test_known_logprobs_are_used_only_for_what_the_student_has_just_sampled() -> None:
    items, _ = random_items()
    template = Objective(lambda_sdl=0.3).template
    on_policy = bound(template, items, on_policy=True)
    assert sampled_by_student(items, bound(template, items)) is None  # after an update, or sampled by the teacher
    [known] = sampled_by_student(items, on_policy) or []
    assert torch.equal(known, items[0].signals["old_logprobs"])
    rescored = {**items[0].signals, "rescored_logprobs": known + 0.1}
    [again] = sampled_by_student([TrainItem(items[0].sequence, rescored)], on_policy) or []
    assert torch.equal(again, known + 0.1)
    mask = items[0].signals[ACTION_MASK].clone()
    mask[3] = False  # a token of an earlier success, sampled by an older student
    imitated = TrainItem(items[0].sequence, {**items[0].signals, ACTION_MASK: mask, IMITATION_MASK: ~mask})
    assert sampled_by_student([*items, imitated], on_policy) is None


def test_what_is_not_finite_is_found() -> None:
    items, today = random_items()
    loss = bound(Objective(lambda_sdl=0.3).template, items)
    today[7] = torch.inf
    assert not gradient(items, loss, [today]).finite
