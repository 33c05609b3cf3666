"""Skill-SD's objective (arXiv 2604.10674): L = reward_weight * L_GRPO + lambda_sdl * L_SDL (+ imitation, a control)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from skillsd import plugins
from skillsd.errors import UserError, unknown_name
from skillsd.objective.distillation import ESTIMATORS, Distillation, find_estimator
from skillsd.objective.logprobs import CHOSEN, WHOLE, TokenLogprobs, Want, at_least_float32, top_k
from skillsd.objective.loss import ACTION_MASK, IMITATION_MASK, TEACHER_MASK, LossTemplate, LossTerm
from skillsd.objective.policy_gradient import PolicyGradient

NORMALISERS = {"tokens": ACTION_MASK, "taught": TEACHER_MASK}
"""`Objective.normaliser` -> the mask whose count divides L_SDL."""


@dataclass(frozen=True)
class Objective:
    """The settings that determine the loss terms (`terms`).

    Attributes:
        reward_weight: 1, or 0 for distillation alone.
        lambda_sdl: the paper's lambda; 0.001 is its value for a 4B model.
        normaliser: what divides L_SDL's sum over tokens with a teacher. ``tokens``: N, the number of action tokens, as
            in L_GRPO (the paper's). ``taught``: the number of tokens with a teacher. With a share s of taught tokens,
            lambda under ``taught`` equals lambda / s under ``tokens``.
        imitation_weight: weight of the negative log-likelihood of the task's best success so far (self-imitation, a
            control that is not in the paper). Those tokens are in no other term.
        estimator: a name for `find_estimator`.
        top_k: give an exact estimator only the teacher's `top_k` most likely tokens and one bucket for the rest, which
            yields a lower bound of the divergence (data processing inequality). None: the whole vocabulary.
        clip_low, clip_high: how far rho may go below and above 1 in the policy term.
        distil_clamp: see `Distillation.clamp`.
        importance_cap: if set, pi_old of the policy term is the training engine's, and the term is weighted by
            `truncated_importance`. The distillation needs no such weight: its rho is relative to the log-probs that
            the sampler reported.
        extra_terms: further terms, after the three of the method.

    Raises:
        UserError: for a negative weight, an unknown estimator, or settings that contradict each other.
    """

    reward_weight: float = 1.0
    lambda_sdl: float = 0.001
    normaliser: Literal["tokens", "taught"] = "tokens"
    imitation_weight: float = 0.0
    estimator: str = "iw_k3"
    top_k: int | None = None
    clip_low: float = 0.2
    clip_high: float = 0.28
    distil_clamp: float | None = None
    importance_cap: float | None = None
    extra_terms: tuple[LossTerm, ...] = ()

    def __post_init__(self) -> None:
        exact = find_estimator(self.estimator).needs_distribution
        if self.top_k is not None and not exact:
            names = [name for name, estimator in ESTIMATORS.items() if estimator.needs_distribution]
            raise UserError(
                f"top_k is {self.top_k}, but the estimator {self.estimator!r} uses only the sampled tokens; top_k is "
                f"for exact estimators, such as {' and '.join(names)}"
            )
        for name in ("reward_weight", "lambda_sdl", "imitation_weight", "clip_low", "clip_high", "distil_clamp"):
            given = getattr(self, name)
            if given is not None and not given >= 0:
                raise UserError(f"{name} is {given}; it must be 0 or more")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise UserError(f"importance_cap is {self.importance_cap}; it must be above 0, or None for no weight")

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        policy = PolicyGradient(self.clip_low, self.clip_high, self.importance_cap)
        # With lambda 0, metrics about the teacher are still logged.
        distillation = Distillation(self.estimator if self.lambda_sdl else None, self.distil_clamp)
        return (
            LossTerm("policy", self.reward_weight, ACTION_MASK, policy),
            LossTerm("distillation", self.lambda_sdl, TEACHER_MASK, distillation, NORMALISERS[self.normaliser]),
            LossTerm("imitation", self.imitation_weight, IMITATION_MASK, negative_log_likelihood),
            *self.extra_terms,
        )

    @property
    def want(self) -> Want:
        """Which log-probs of student and teacher the terms need."""
        if not self.lambda_sdl or not find_estimator(self.estimator).needs_distribution:
            return CHOSEN
        return WHOLE if self.top_k is None else top_k(self.top_k)

    @property
    def template(self) -> LossTemplate:
        """The loss, to be bound to each minibatch."""
        return LossTemplate(self.terms, self.want)


def negative_log_likelihood(student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """-log pi of the tokens to imitate."""
    return -at_least_float32(student.chosen), {"imitation_loss": -student.chosen}


def find_term(name: str, fn: str, weight: float, mask: str, normaliser: str | None = None) -> LossTerm:
    """A loss term whose function is given as ``module:function``, or ``module:Class`` to be called without arguments.

    Raises:
        UserError: if it can't be imported or called.
    """
    found = plugins.find("loss term", fn, ())
    if isinstance(found, type):
        found = plugins.construct(f"loss term {fn!r}", "without arguments", found, {})
    if not callable(found):
        raise UserError(f"loss term {fn!r} is {type(found).__name__}, expected a function (student, signals) -> losses")
    return LossTerm(name, weight, mask, found, normaliser)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,  # the paper's
    "linear_decay": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
}
"""Progress of the training, from 0 to 1 -> factor on the initial value."""


def scheduled(value: float, schedule: str, progress: float) -> float:
    """`value` at a training progress from 0 to 1; beyond that, the end's."""
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    return value * SCHEDULES[schedule](min(max(progress, 0.0), 1.0))
