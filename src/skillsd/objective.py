"""The objective: L = reward_weight * L_GRPO + lambda_sdl * L_SDL (arXiv 2604.10674; METHOD.md, "The losses").

Tensors in, tensors out; everything is per action token, flat over the batch. Symbols:

    y_t    the sampled token                       pi      the student, theta
    h_t    its history: the student's own          pi_old  the policy that sampled y_t
    q      the teacher: theta_bar, told x + S(x)   rho     ratio, pi(y_t) / pi_old(y_t)
    l      log_ratio, log pi(y_t) - log q(y_t)     grad    gradient of log pi(y_t) with respect to theta

What is back-propagated and what is logged differ on purpose: see `DistillationTerms`. Arithmetic is float32
at least (lower precision is widened on entry, float64 stays). Nothing is clipped unasked: what overflows
becomes an inf that the engine's step refuses, not a number that passes for a gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skillsd.errors import UserError, unknown_name
from skillsd.metrics import Mean, Metrics


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs of the action tokens under one policy.

    Attributes:
        chosen: of the tokens that were sampled, ``[tokens]``.
        distribution: of the whole vocabulary at those places, normalised, ``[tokens, vocab]``.
    """

    chosen: Tensor
    distribution: Tensor | None = None

    def at(self, keep: Tensor) -> TokenLogprobs:
        """The tokens that the boolean mask `keep` ``[tokens]`` marks."""
        if bool(keep.all()):
            return self  # saves a copy of [tokens, vocab]
        kept = None if self.distribution is None else self.distribution[keep]
        return TokenLogprobs(self.chosen[keep], kept)


# ----------------------------------------------------------------------------------------- the reward's term


def group_advantages(rewards: Sequence[float] | Tensor, *, eps: float = 1e-6, scale_by_std: bool = True) -> Tensor:
    """Group-relative advantages, A_i = (R_i - mean R) / (std R + eps) (GRPO; METHOD.md, "The losses").

    The paper does not say which std. This is the *population's*: the group is all that is compared, and the
    mean of A^2 is then 1 whatever the group's size, so that a learning rate carries over. (TRL and verl take
    the sample's, which shrinks A by sqrt((G - 1) / G): to 0.71 for pairs.)

    Args:
        rewards: R_i of the trajectories of one group, ``[group]``.
        eps: keeps nearly equal rewards from being blown up to unit scale.
        scale_by_std: False leaves the division out.

    Returns:
        ``[group]``, float64. Exactly zeros for a group of one or of equal rewards.

    Raises:
        ValueError: if a reward is not finite: a trajectory without a reward does not belong in a group.
    """
    returns = torch.as_tensor(rewards, dtype=torch.float64)
    if returns.ndim != 1 or returns.numel() == 0 or not bool(returns.isfinite().all()):
        raise ValueError(f"the rewards of a group must be one or more finite numbers, got {rewards}")
    if bool((returns == returns[0]).all()):
        return torch.zeros_like(returns)  # and not the rounding error of the mean, divided by eps
    centred = returns - returns.mean()
    return centred / (returns.std(correction=0) + eps) if scale_by_std else centred


@dataclass(frozen=True)
class PolicyTerms:
    """The policy term of each token, ``[tokens]`` each.

    Attributes:
        loss: with gradient.
        ratio: rho, without gradient.
        clipped: True where the clip cut the gradient to zero.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> PolicyTerms:
    """Clipped surrogate, -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (PPO, eq. 7; L_GRPO).

    Args:
        logprobs: log pi(y_t), ``[tokens]``, with gradient.
        old_logprobs: log pi_old(y_t), ``[tokens]``.
        advantages: A_i of the trajectory that the token belongs to, ``[tokens]``.
        clip_low, clip_high: how far rho may go below and above 1.
    """
    ratio = (_wide(logprobs) - _wide(old_logprobs.detach())).exp()
    advantages = _wide(advantages.detach())
    low, high = 1.0 - clip_low, 1.0 + clip_high
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    ratio = ratio.detach()
    # The minimum cuts only what has gone far enough the way the advantage asks; the way back stays open.
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    return PolicyTerms(loss, ratio, clipped)


def truncated_importance(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old(y_t) / mu(y_t), cap): truncated importance sampling between two engines.

    A sampling engine (mu) and the training engine (pi_old) compute the same weights' log-probs with other kernels, in
    other precision. Uncapped, the mean over y_t ~ mu of weight times anything is its mean over y_t ~ pi_old; the cap
    trades a little bias for a bounded variance (Ionides, 2008; between two engines: Yao et al., 2025, "Your Efficient
    RL Framework Secretly Brings You Off-Policy RL Training"). Not in the paper.

    Args:
        logprobs: log pi_old(y_t), by the training engine, ``[tokens]``.
        sampler_logprobs: log mu(y_t), as the sampling engine reported it, ``[tokens]``.
        cap: C, above 0.

    Returns:
        ``[tokens]``, without gradient.
    """
    return _log_ratio(logprobs, sampler_logprobs).exp().clamp(max=cap)


# ---------------------------------------------------------------------------------------- the teacher's term


@dataclass(frozen=True)
class DistillationTerms:
    """What an estimator says of each token, ``[tokens]`` each.

    Attributes:
        surrogate: to back-propagate. In the sampled-token estimators it is ``stopgrad(weight) * log pi``: its
            gradient ``weight * grad`` is written down, not left to autograd, and its value means nothing.
        value: the divergence, without gradient, for the log.
        log_ratio: l, without gradient.
    """

    surrogate: Tensor
    value: Tensor
    log_ratio: Tensor


EstimatorFunction = Callable[[TokenLogprobs, TokenLogprobs, Tensor], DistillationTerms]


@dataclass(frozen=True)
class Estimator:
    """A way to estimate the divergence of student and teacher: (student, teacher, old_logprobs) -> terms."""

    terms: EstimatorFunction
    needs_distribution: bool


ESTIMATORS: dict[str, Estimator] = {}


def _sampled(equation: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> EstimatorFunction:
    """Register an estimator on the sampled tokens, written as (log rho, l) -> (weight, value)."""

    @functools.wraps(equation)
    def terms(student: TokenLogprobs, teacher: TokenLogprobs, old_logprobs: Tensor) -> DistillationTerms:
        log_ratio = _log_ratio(student.chosen, teacher.chosen)
        weight, value = equation(_log_ratio(student.chosen, old_logprobs), log_ratio)
        return DistillationTerms(weight * _wide(student.chosen), value, log_ratio)

    ESTIMATORS[equation.__name__] = Estimator(terms, needs_distribution=False)
    return terms


def _exact(equation: Callable[[Tensor, Tensor], Tensor]) -> EstimatorFunction:
    """Register a divergence over the whole vocabulary, written as (log pi, log q) -> value, with gradient."""

    @functools.wraps(equation)
    def terms(student: TokenLogprobs, teacher: TokenLogprobs, old_logprobs: Tensor) -> DistillationTerms:
        p, q = student.distribution, teacher.distribution
        if p is None or q is None or p.shape != q.shape:
            got = [None if x is None else list(x.shape) for x in (p, q)]
            raise ValueError(f"{equation.__name__} needs student's and teacher's [tokens, vocab]; got {got}")
        value = equation(_wide(p), _wide(q.detach()))
        return DistillationTerms(value, value.detach(), _log_ratio(student.chosen, teacher.chosen))

    ESTIMATORS[equation.__name__] = Estimator(terms, needs_distribution=True)
    return terms


@_sampled
def iw_k3(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """rho * (exp(-l) - 1 + l): importance-weighted reverse KL, the paper's L_SDL.

    Over y ~ pi_old its mean is KL(pi || q) for any pi_old with full support, and the mean of its gradient
    ``rho * l * grad`` is the exact reverse-KL gradient, on-policy and after off-policy steps. There exp(-l)
    has cancelled, between the derivatives of rho and of k3. Autograd through the value must cancel it in
    floating point: wrong in float32 for l < -15, zero in bfloat16 for l <= -10. No clip on rho: a bias.
    """
    return log_rho.exp() * log_ratio, _iw_k3_value(log_rho, log_ratio)


@_sampled
def iw_k1(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """rho * l: the same mean as `iw_k3` and the same mean gradient, on- and off-policy, with more noise.

    The gradient is ``rho * (1 + l) * grad``; the extra ``rho * grad`` has mean zero.
    """
    rho = log_rho.exp()
    return rho * (1.0 + log_ratio), rho * log_ratio


@_sampled
def k1(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """l. On-policy its mean is KL(pi || q), but its gradient ``grad`` has mean ZERO: no teacher is in it.

    The control that a comparison of estimators needs, not a way to distil.
    """
    return torch.ones_like(log_ratio), log_ratio


@_sampled
def k2(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """l^2 / 2. Its value is biased, but its gradient ``l * grad`` is on-policy the reverse KL's."""
    return log_ratio, log_ratio.square() / 2


@_sampled
def k3(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """exp(-l) - 1 + l, no rho. On-policy its mean is KL(pi || q), but its gradient is that of KL(q || pi).

    That is the bias which rho corrects. The gradient, ``(1 - exp(-l)) * grad``, is taken by expm1, so a small
    l loses no digits. At l = -20 it really is 5e8, and it is left so; in float32 it is inf for l < -88.
    `Objective.distil_clamp` is the remedy.
    """
    return -torch.expm1(-log_ratio), _k3_value(log_ratio)


@_exact
def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(pi || q) = sum_v pi(v) (log pi(v) - log q(v)), at the student's visited histories h_t.

    The mean of `iw_k3` over y_t ~ pi_old, without its noise. No rho, off-policy either: rho_t corrects how
    y_t was drawn, and y_t plays no part here. (That h_t was reached by pi_old stays uncorrected in both.)
    """
    return _kl(log_p, log_q)


@_exact
def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || pi) = sum_v q(v) (log q(v) - log pi(v)), at the student's visited histories h_t. No rho."""
    return _kl(log_q, log_p)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _log_ratio(logprobs: Tensor, others: Tensor) -> Tensor:
    return _wide(logprobs.detach()) - _wide(others.detach())


def _k3_value(log_ratio: Tensor) -> Tensor:
    """exp(-l) - 1 + l."""
    return torch.expm1(-log_ratio) + log_ratio


def _iw_k3_value(log_rho: Tensor, log_ratio: Tensor) -> Tensor:
    """rho * (exp(-l) - 1 + l). Where l is far below zero, rho * exp(-l) is one exponent (it is q / pi_old):
    after drift rho may underflow where exp(-l) overflows, and 0 * inf is nan."""
    rho = log_rho.exp()
    far = (log_rho - log_ratio).exp() + rho * (log_ratio - 1.0)
    return torch.where(log_ratio < -1.0, far, rho * _k3_value(log_ratio))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), ``[tokens, vocab]`` -> ``[tokens]``, with 0 log 0 = 0 for tokens that are ruled out."""
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


# --------------------------------------------------------------------------------------------- both together


@dataclass(frozen=True)
class Objective:
    """L = reward_weight * L_GRPO + lambda_sdl * L_SDL + imitation_weight * L_SI.

    L_SI, a control that is not the paper's, is the mean of -log pi over the tokens of the task's best success so far
    (self-imitation). Those tokens take part in nothing else.

    Attributes:
        reward_weight: 1, or 0 for distillation alone.
        lambda_sdl: the paper's lambda; 0.001 is its value for a 4B model.
        imitation_weight: of L_SI; 0 is none.
        estimator: a name in `ESTIMATORS`.
        top_k: the distributions that an exact estimator gets are those of the teacher's `top_k` most likely tokens and
            one bucket for the rest, so it is a lower bound of the divergence (data processing inequality). None: the
            whole vocabulary.
        clip_low, clip_high: of the policy term. The paper gives none; 0.2 is PPO's.
        distil_clamp: a change of method, hence off (None). If set, tokens with |l| above it give the
            distillation no gradient; they stay in its denominator, and `distil_clamped` counts them.
        importance_cap: if set, pi_old of the policy term is the training engine's, and the term is weighted by
            `truncated_importance`. The distillation needs no such weight: its rho is over what the sampler reported.
    """

    reward_weight: float = 1.0
    lambda_sdl: float = 0.001
    imitation_weight: float = 0.0
    estimator: str = "iw_k3"
    top_k: int | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    distil_clamp: float | None = None
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise unknown_name("estimator", self.estimator, ESTIMATORS)
        if self.top_k is not None and not ESTIMATORS[self.estimator].needs_distribution:
            exact = [name for name, estimator in ESTIMATORS.items() if estimator.needs_distribution]
            raise UserError(
                f"top_k is {self.top_k}, but the estimator {self.estimator!r} looks at the sampled token alone; top_k "
                f"is for {' and '.join(exact)}"
            )
        for name in ("reward_weight", "lambda_sdl", "imitation_weight", "clip_low", "clip_high", "distil_clamp"):
            given = getattr(self, name)
            if given is not None and not given >= 0:
                raise UserError(f"{name} is {given}; it must be 0 or more")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise UserError(f"importance_cap is {self.importance_cap}; it must be above 0, or None for no weight")

    @property
    def needs_distribution(self) -> bool:
        """Whether log-probs over the whole vocabulary are needed, of the student and of the teacher."""
        return self.lambda_sdl > 0 and ESTIMATORS[self.estimator].needs_distribution

    def __call__(
        self, student: TokenLogprobs, signals: Mapping[str, Tensor], normalisers: Mapping[str, float]
    ) -> tuple[Tensor, Metrics]:
        """The loss of a micro-batch, a scalar to back-propagate, and its metrics.

        Sums are divided by GLOBAL counts, so the gradient is the same however the batch is cut. The mean of
        the distillation is over the action tokens that have a teacher.

        Args:
            student: log-probs of the action tokens, with gradient.
            signals: aligned with them: ``old_logprobs`` (the sampler's), ``advantages``, ``teacher_logprobs`` (anything
                where there is no teacher) ``[tokens]``, ``has_teacher`` ``[tokens]`` bool; where there is something to
                imitate, ``imitated`` ``[tokens]`` bool; with `importance_cap`, ``rescored_logprobs`` ``[tokens]`` (of
                the weights that sampled, by the training engine); if `needs_distribution`, ``teacher_distribution``
                ``[tokens, vocab]`` (or ``[tokens, top_k + 1]``).
            normalisers: of the whole minibatch, ``action_tokens``, ``teacher_tokens`` (those with a teacher) and
                ``imitated_tokens`` (not among the action tokens).
        """
        _check_aligned(student.chosen, signals)
        again = signals.get("imitated")
        if again is None or not bool(again.any()):
            return self._of_own_tokens(student, signals, normalisers)
        likelihood = student.chosen[again]
        imitation = -_wide(likelihood).sum() / max(normalisers["imitated_tokens"], 1)
        loss, metrics = self.imitation_weight * imitation, _means({"imitation_loss": -likelihood})
        if bool(again.all()):
            return loss, metrics
        own = {name: signal[~again] for name, signal in signals.items()}
        rest, more = self._of_own_tokens(student.at(~again), own, normalisers)
        return loss + rest, metrics | more

    def _of_own_tokens(
        self, student: TokenLogprobs, signals: Mapping[str, Tensor], normalisers: Mapping[str, float]
    ) -> tuple[Tensor, Metrics]:
        old_logprobs, advantages, taught = (signals[k] for k in ("old_logprobs", "advantages", "has_teacher"))
        sampled_by = old_logprobs if self.importance_cap is None else signals["rescored_logprobs"]
        policy = clipped_policy_loss(
            student.chosen, sampled_by, advantages, clip_low=self.clip_low, clip_high=self.clip_high
        )
        policy_loss, logged = policy.loss, {}
        if self.importance_cap is not None:
            weight = truncated_importance(sampled_by, old_logprobs, self.importance_cap)
            policy_loss = weight * policy_loss
            logged = {"importance": weight, "importance_capped": weight >= self.importance_cap}
        loss = self.reward_weight * policy_loss.sum() / max(normalisers["action_tokens"], 1)
        logged |= {
            "policy_loss": policy_loss,
            "ratio": policy.ratio,
            "clip_fraction": policy.clipped,
            # unbiased for KL(pi_old || pi), as the tokens are pi_old's
            "kl_old_new": _k3_value(_log_ratio(old_logprobs, student.chosen)),
        }
        if student.distribution is not None and self.top_k is None:
            p = _wide(student.distribution.detach()).exp()
            logged["entropy"] = -torch.special.xlogy(p, p).sum(-1)
        metrics = _means(logged)
        if not bool(taught.any()):
            return loss, metrics
        if normalisers["teacher_tokens"] < taught.sum():
            given = normalisers["teacher_tokens"]
            raise ValueError(f"teacher_tokens of the batch is {given}, but {taught.sum()} are here alone")
        # Selected, not multiplied by a mask: what stands where there is no teacher is never computed with.
        teacher = TokenLogprobs(signals["teacher_logprobs"], signals.get("teacher_distribution")).at(taught)
        summed, teacher_metrics = self._distil(student.at(taught), teacher, old_logprobs[taught])
        loss = loss + self.lambda_sdl * summed / normalisers["teacher_tokens"]
        return loss, metrics | teacher_metrics

    def _distil(self, student: TokenLogprobs, teacher: TokenLogprobs, old: Tensor) -> tuple[Tensor, Metrics]:
        """Summed surrogate of the tokens that have a teacher, and what the log says of them."""
        log_ratio = _log_ratio(student.chosen, teacher.chosen)
        clamped = log_ratio.abs() > (math.inf if self.distil_clamp is None else self.distil_clamp)
        metrics = _means({
            "teacher_log_ratio": log_ratio,
            "teacher_log_ratio_square": log_ratio.square(),  # with the mean, the spread
            "teacher_k3": _iw_k3_value(_log_ratio(student.chosen, old), log_ratio),  # whatever the estimator
            "distil_clamped": clamped,
        })  # fmt: skip
        if self.lambda_sdl == 0:
            return torch.zeros_like(log_ratio).sum(), metrics
        terms = ESTIMATORS[self.estimator].terms(student.at(~clamped), teacher.at(~clamped), old[~clamped])
        return terms.surrogate.sum(), metrics | _means({"distil_value": terms.value})


def _means(values: Mapping[str, Tensor]) -> Metrics:
    """Means of vectors ``[tokens]`` of one length, in one transfer from the device. Nothing for no tokens."""
    count = len(next(iter(values.values())))
    if count == 0:
        return {}
    vectors = [_wide(value.detach()) * 1.0 for value in values.values()]  # * 1.0: a mask becomes a share
    rows = torch.stack([torch.stack([x.sum(), x.amin(), x.amax()]) for x in vectors]).tolist()
    return {name: Mean(row[0], count, row[1], row[2]) for name, row in zip(values, rows, strict=True)}


def _check_aligned(logprobs: Tensor, signals: Mapping[str, Tensor]) -> None:
    """A shape that is off by an axis would broadcast to a wrong loss without a word."""
    for name, signal in signals.items():
        shape = signal.shape[:1] if name in ("teacher_distribution", "candidates") else signal.shape
        if logprobs.ndim != 1 or shape != logprobs.shape:
            raise ValueError(f"{name} is {list(signal.shape)}; the log-probs are {list(logprobs.shape)}")


# ----------------------------------------------------------------------------------------- lambda's schedule

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,  # the paper's
    "linear_decay": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
}
"""What is left of the value after a share `progress` of the training."""


def scheduled(value: float, schedule: str, progress: float) -> float:
    """`value` after a share `progress` of the training. The caller applies it, by ``dataclasses.replace``."""
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    return value * SCHEDULES[schedule](min(max(progress, 0.0), 1.0))
