"""The losses: pure functions of log-probs, one equation each, composed from terms given as data."""

from skillsd.objective.distillation import (
    ESTIMATORS,
    Distillation,
    DistillationTerms,
    Estimator,
    find_estimator,
    sampled_token,
    whole_distribution,
)
from skillsd.objective.logprobs import CHOSEN, WHOLE, TokenLogprobs, Want, top_k
from skillsd.objective.loss import (
    ACTION_MASK,
    DIVERGENCE,
    IMITATION_MASK,
    SAMPLER_DIFF,
    STUDENT_LOGPROBS,
    TEACHER_MASK,
    TOKEN_NUMBER,
    Loss,
    LossTemplate,
    LossTerm,
)
from skillsd.objective.objective import SCHEDULES, Objective, find_term, scheduled
from skillsd.objective.policy_gradient import (
    PolicyGradient,
    clipped_policy_loss,
    group_advantages,
    truncated_importance,
)

__all__ = [
    "ACTION_MASK",
    "CHOSEN",
    "DIVERGENCE",
    "ESTIMATORS",
    "IMITATION_MASK",
    "SAMPLER_DIFF",
    "SCHEDULES",
    "STUDENT_LOGPROBS",
    "TEACHER_MASK",
    "TOKEN_NUMBER",
    "WHOLE",
    "Distillation",
    "DistillationTerms",
    "Estimator",
    "Loss",
    "LossTemplate",
    "LossTerm",
    "Objective",
    "PolicyGradient",
    "TokenLogprobs",
    "Want",
    "clipped_policy_loss",
    "find_estimator",
    "find_term",
    "group_advantages",
    "sampled_token",
    "scheduled",
    "top_k",
    "truncated_importance",
    "whole_distribution",
]
