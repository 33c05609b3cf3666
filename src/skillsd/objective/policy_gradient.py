"""The reward's term, L_GRPO: group-relative advantages and the clipped surrogate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skillsd.objective.logprobs import TokenLogprobs, at_least_float32, log_difference


def group_advantages(rewards: Sequence[float] | Tensor, *, eps: float = 1e-6, scale_by_std: bool = True) -> Tensor:
    """Group-relative advantages, A_i = (R_i - mean R) / (std R + eps) (GRPO).

    The paper does not say which standard deviation. This is the population's: the mean of A^2 is then 1 for every group
    size, so a learning rate carries over between sizes. (TRL and verl use the sample's, which shrinks A by
    sqrt((G - 1) / G): to 0.71 for pairs.)

    Args:
        rewards: R_i of the trajectories of one group, ``[group]``.
        eps: prevents nearly equal rewards from being scaled up to unit variance.
        scale_by_std: False: no division.

    Returns:
        ``[group]``, float64. Exactly zero for a group of one or of equal rewards.

    Raises:
        ValueError: if a reward is not finite, or there is none.
    """
    returns = torch.as_tensor(rewards, dtype=torch.float64)
    if returns.ndim != 1 or returns.numel() == 0 or not bool(returns.isfinite().all()):
        raise ValueError(f"the rewards of a group must be one or more finite numbers, got {rewards}")
    if bool((returns == returns[0]).all()):
        return torch.zeros_like(returns)  # not the mean's rounding error divided by eps
    centred = returns - returns.mean()
    return centred / (returns.std(correction=0) + eps) if scale_by_std else centred


@dataclass(frozen=True)
class ClippedSurrogate:
    """The policy loss of each token, ``[tokens]`` each.

    Attributes:
        loss: with gradient.
        ratio: rho = pi / pi_old, without gradient.
        clipped: True where clipping set the gradient to zero.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> ClippedSurrogate:
    """Clipped surrogate, -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (PPO, eq. 7; the paper's L_GRPO).

    Args:
        logprobs: log pi(y_t), ``[tokens]``, with gradient.
        old_logprobs: log pi_old(y_t), ``[tokens]``.
        advantages: A_i of the trajectory that the token belongs to, ``[tokens]``.
        clip_low, clip_high: how far rho may go below and above 1.
    """
    ratio = (at_least_float32(logprobs) - at_least_float32(old_logprobs.detach())).exp()
    advantages = at_least_float32(advantages.detach())
    low, high = 1.0 - clip_low, 1.0 + clip_high
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    ratio = ratio.detach()
    # The minimum clips only where the ratio has moved in the advantage's direction; the other side keeps its gradient.
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    return ClippedSurrogate(loss, ratio, clipped)


def truncated_importance(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old(y_t) / mu(y_t), cap): truncated importance sampling between two engines.

    A sampling engine (mu) and the training engine (pi_old) compute log-probs of the same weights with different kernels
    and precision. Without a cap, weighted means over y_t ~ mu are means over y_t ~ pi_old; the cap trades a little bias
    for bounded variance (Ionides, 2008; between two engines: Yao et al., 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training"). Not in the paper.

    Args:
        logprobs: log pi_old(y_t), by the training engine, ``[tokens]``.
        sampler_logprobs: log mu(y_t), as the sampling engine reported it, ``[tokens]``.
        cap: C, above 0.

    Returns:
        ``[tokens]``, without gradient.
    """
    return log_difference(logprobs, sampler_logprobs).exp().clamp(max=cap)


@dataclass(frozen=True)
class PolicyGradient:
    """L_GRPO as a loss term's function.

    Reads the signals ``old_logprobs`` (the sampler's) and ``advantages``; with `importance_cap` also
    ``rescored_logprobs`` (the weights that sampled, scored by the training engine), which then serve as pi_old.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    importance_cap: float | None = None

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        sampler, advantages = signals["old_logprobs"], signals["advantages"]
        old = sampler if self.importance_cap is None else signals["rescored_logprobs"]
        policy = clipped_policy_loss(student.chosen, old, advantages, clip_low=self.clip_low, clip_high=self.clip_high)
        loss, logged = policy.loss, {}
        if self.importance_cap is not None:
            weight = truncated_importance(old, sampler, self.importance_cap)
            loss = weight * loss
            logged = {"importance": weight, "importance_capped": weight >= self.importance_cap}
        change = log_difference(sampler, student.chosen)
        logged |= {
            "policy_loss": loss,
            "ratio": policy.ratio,
            "clip_fraction": policy.clipped,
            # k3, unbiased for KL(pi_old || pi): the tokens are sampled from pi_old.
            "kl_old_new": torch.expm1(-change) + change,
        }
        if student.distribution is not None and student.candidates is None:
            p = at_least_float32(student.distribution.detach()).exp()
            logged["entropy"] = -torch.special.xlogy(p, p).sum(-1)
        return loss, logged
