"""Any loss on sampled tokens as data of the protocol's loss ``importance_sampling``.

That loss is ``-sum_t rho_t A_t`` with a constant advantage A_t for each token and rho_t = pi(y_t) / p_t, where the
request gives log p_t. With p_t = pi(y_t), rho is 1, and its gradient ``-sum_t A_t grad log pi(y_t)`` is that of any
loss L of the log-probs if A_t = -dL / dlog pi(y_t). So one pass for today's log-probs, autograd here, and one pass for
the gradient are exact: the *general route*.

Before the first update after sampling, pi is the policy that sampled, so its log-probs are known already, and the first
pass is not needed: *one datum* for each trajectory. Skill-SD's gradient (`skillsd.objective`) is

    grad L = -sum_t rho_t A~_t grad log pi(y_t)
    A~_t = (w / N) A_t 1{not clipped} - (lambda / N) 1{taught} l_t,   l_t = log pi(y_t) - log q(y_t)

and the server multiplies by rho_t, with its own log pi. Off policy that would be wrong: with the sampler's log-probs in
l_t, the distillation's mean gradient is grad KL(pi || q) - grad KL(pi || pi_old).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skillsd.engines.base import Loss, TokenSequence, TrainItem
from skillsd.metrics import Metrics
from skillsd.objective import ACTION_MASK
from skillsd.objective.logprobs import TokenLogprobs


@dataclass(frozen=True)
class Share:
    """One sequence's share of a step's gradient.

    Attributes:
        logprobs: log p_t of the marked tokens, ``[marked]``.
        advantages: A_t, ``[marked]``.
    """

    sequence: TokenSequence
    logprobs: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class Gradient:
    """A loss's gradient with respect to the log-probs of a batch.

    Attributes:
        finite: whether the loss and all of its gradient are.
        metrics: the loss's.
    """

    shares: list[Share]
    finite: bool
    metrics: Metrics


def gradient(batch: Sequence[TrainItem], loss: Loss, logprobs: Sequence[Tensor]) -> Gradient:
    """The gradient of `loss` where the student has these log-probs, ``[marked]`` for each item."""
    leaf = torch.cat(list(logprobs)).requires_grad_()
    value, metrics = evaluate(batch, loss, leaf)
    (found,) = torch.autograd.grad(value, leaf)
    finite = bool(torch.isfinite(value.detach()) and torch.isfinite(found).all())
    pieces = found.split([item.sequence.marked for item in batch])
    shares = [
        Share(item.sequence, own.detach(), -piece) for item, own, piece in zip(batch, logprobs, pieces, strict=True)
    ]
    return Gradient(shares, finite, metrics)


def evaluate(batch: Sequence[TrainItem], loss: Loss, logprobs: Tensor) -> tuple[Tensor, Metrics]:
    """The loss of a batch whose marked tokens have these log-probs, ``[tokens]`` of all items together."""
    names = batch[0].signals.keys()
    return loss(TokenLogprobs(logprobs), {name: torch.cat([item.signals[name] for item in batch]) for name in names})


def sampled_by_student(batch: Sequence[TrainItem], loss: Loss) -> list[Tensor] | None:
    """The student's log-probs as they are known from sampling, ``[marked]`` for each item.

    Those that the learner has scored again take precedence. None if the student has moved since, did not sample, or
    some tokens are not from this iteration.
    """
    if not getattr(loss, "compare_with_sampler", False):
        return None
    if not all(bool(item.signals[ACTION_MASK].all()) for item in batch):
        return None
    return [item.signals.get("rescored_logprobs", item.signals["old_logprobs"]) for item in batch]
