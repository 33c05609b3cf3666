"""What a user adds to the objective from outside the package: a loss term, and estimators."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from skillsd.objective import TokenLogprobs, sampled_token, whole_distribution
from skillsd.objective.logprobs import log_difference

THRESHOLD = 1.0


def gated_distillation(student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's L_SDL with a gate: weight 1 where |l| < `THRESHOLD`, otherwise 0. Gradient: gate * rho * l * grad."""
    log_rho = log_difference(student.chosen, signals["old_logprobs"])
    log_ratio = log_difference(student.chosen, signals["teacher_logprobs"])
    gate = log_ratio.abs() < THRESHOLD
    return gate * log_rho.exp() * log_ratio * student.chosen, {"gate_open": gate}


class TermClass:
    """Also a term function, if made without arguments."""

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> Tensor:
        return -student.chosen


NOT_CALLABLE = 3


@sampled_token
def clipped_iw_k3(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of iw_k3 with rho at most 1."""
    rho = log_rho.exp().clamp(max=1.0)
    return rho * log_ratio, rho * (torch.expm1(-log_ratio) + log_ratio)


@whole_distribution
def half_total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def not_an_estimator(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p - log_q
