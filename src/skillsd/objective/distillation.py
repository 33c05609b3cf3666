"""The teacher's term, L_SDL: estimators of the divergence between student and teacher.

Symbols, per action token:

    y_t    the sampled token                       pi      the student, theta
    h_t    its history: the student's own          pi_old  the policy that sampled y_t
    q      the teacher: theta_bar on x + S(x)      rho     importance weight, pi(y_t) / pi_old(y_t)
    l      log_ratio, log pi(y_t) - log q(y_t)     grad    gradient of log pi(y_t) with respect to theta

The back-propagated surrogate and the logged value differ on purpose: see `DistillationTerms`. Arithmetic is in float32
or better: half precision is widened first, float64 stays. Nothing is clipped unless configured: an overflow becomes an
inf, which the optimiser step refuses, instead of a finite but wrong gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skillsd import plugins
from skillsd.errors import UserError
from skillsd.objective.checked import pair_of, per_token
from skillsd.objective.logprobs import TokenLogprobs, at_least_float32, log_difference


@dataclass(frozen=True)
class DistillationTerms:
    """An estimator's result for each token, ``[tokens]`` each.

    Attributes:
        surrogate: the tensor to back-propagate. For the sampled-token estimators it is ``stopgrad(weight) * log pi``,
            with the gradient ``weight * grad``; its value has no meaning.
        value: the divergence, without gradient, for logging.
    """

    surrogate: Tensor
    value: Tensor


EstimatorFunction = Callable[[TokenLogprobs, TokenLogprobs, Tensor], DistillationTerms]


@dataclass(frozen=True)
class Estimator:
    """A way to estimate the divergence between student and teacher.

    Attributes:
        terms: (student, teacher, old_logprobs ``[tokens]``) -> `DistillationTerms`.
        needs_distribution: whether it needs log-probs of more than the sampled token.
    """

    terms: EstimatorFunction
    needs_distribution: bool = False


def sampled_token(equation: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Estimator:
    """Decorator: an estimator on the sampled tokens, from an equation (log rho, l) -> (weight, value).

    All are ``[tokens]``. The gradient is ``weight * grad``. To use your own:
    ``objective.estimator: my_module:my_estimator``.
    """

    def terms(student: TokenLogprobs, teacher: TokenLogprobs, old_logprobs: Tensor) -> DistillationTerms:
        ratio = log_difference(student.chosen, teacher.chosen)
        result = equation(log_difference(student.chosen, old_logprobs), ratio)
        weight, value = pair_of(_name(equation), result, len(ratio))
        return DistillationTerms(weight * at_least_float32(student.chosen), value)

    return Estimator(terms, needs_distribution=False)


def whole_distribution(equation: Callable[[Tensor, Tensor], Tensor]) -> Estimator:
    """Decorator: an exact divergence, from an equation (log pi, log q), ``[tokens, vocab]`` each -> value ``[tokens]``.

    The gradient is autograd's, through log pi.
    """

    def terms(student: TokenLogprobs, teacher: TokenLogprobs, old_logprobs: Tensor) -> DistillationTerms:
        p, q = student.distribution, teacher.distribution
        if p is None or q is None or p.shape != q.shape:
            got = [None if x is None else list(x.shape) for x in (p, q)]
            raise ValueError(
                f"an exact divergence needs distributions [tokens, vocab] of student and teacher; got shapes {got}"
            )
        found = equation(at_least_float32(p), at_least_float32(q.detach()))
        value = per_token(found, f"the value of the estimator {_name(equation)!r}", len(p))
        return DistillationTerms(value, value.detach())

    return Estimator(terms, needs_distribution=True)


def _name(equation: Callable[..., object]) -> str:
    return getattr(equation, "__name__", type(equation).__name__)


@sampled_token
def iw_k3(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """rho * (exp(-l) - 1 + l): importance-weighted reverse KL, the paper's L_SDL.

    Over y ~ pi_old its mean is KL(pi || q) for any pi_old with full support, and the mean of its gradient
    ``rho * l * grad`` is the exact reverse-KL gradient, on-policy and off-policy. In that gradient exp(-l) has
    cancelled between the derivatives of rho and k3. Autograd through the value would cancel it in floating point: wrong
    in float32 for l < -15, zero in bfloat16 for l <= -10. rho is not clipped, which would add a bias.
    """
    return log_rho.exp() * log_ratio, iw_k3_value(log_rho, log_ratio)


@sampled_token
def iw_k1(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """rho * l: the same mean and mean gradient as `iw_k3`, on- and off-policy, with more variance.

    The gradient is ``rho * (1 + l) * grad``; the extra ``rho * grad`` has mean zero.
    """
    rho = log_rho.exp()
    return rho * (1.0 + log_ratio), rho * log_ratio


@sampled_token
def k1(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """l. On-policy its mean is KL(pi || q), but its gradient ``grad`` has mean zero and does not depend on the teacher.

    A control for comparing estimators; it does not distil.
    """
    return torch.ones_like(log_ratio), log_ratio


@sampled_token
def k2(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """l^2 / 2. The value is biased, but on-policy the mean of its gradient ``l * grad`` is the reverse KL's."""
    return log_ratio, log_ratio.square() / 2


@sampled_token
def k3(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """exp(-l) - 1 + l, without rho. On-policy its mean is KL(pi || q), but the mean of its gradient is KL(q || pi)'s.

    rho corrects this bias. The gradient ``(1 - exp(-l)) * grad`` is computed with expm1, which is accurate for small l.
    At l = -20 it is 5e8, and inf in float32 for l < -88. To bound it, set `Distillation.clamp`.
    """
    return -torch.expm1(-log_ratio), k3_value(log_ratio)


@whole_distribution
def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(pi || q) = sum_v pi(v) (log pi(v) - log q(v)), at the student's visited histories h_t.

    The mean of `iw_k3` over y_t ~ pi_old, without its variance. No rho, even off-policy: rho_t corrects for the
    sampling of y_t, which is not used here. (Neither corrects for h_t having been sampled by pi_old.)
    """
    return _kl(log_p, log_q)


@whole_distribution
def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || pi) = sum_v q(v) (log q(v) - log pi(v)), at the student's visited histories h_t. No rho."""
    return _kl(log_q, log_p)


def k3_value(log_ratio: Tensor) -> Tensor:
    """exp(-l) - 1 + l."""
    return torch.expm1(-log_ratio) + log_ratio


def iw_k3_value(log_rho: Tensor, log_ratio: Tensor) -> Tensor:
    """rho * (exp(-l) - 1 + l). For l < -1, rho * exp(-l), which is q / pi_old, is computed as one exponential: rho may
    underflow where exp(-l) overflows, and 0 * inf is nan."""
    rho = log_rho.exp()
    far = (log_rho - log_ratio).exp() + rho * (log_ratio - 1.0)
    return torch.where(log_ratio < -1.0, far, rho * k3_value(log_ratio))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), ``[tokens, vocab]`` -> ``[tokens]``, with 0 log 0 = 0 for impossible tokens."""
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


ESTIMATORS: dict[str, Estimator] = {
    "iw_k3": iw_k3,
    "iw_k1": iw_k1,
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
}


def find_estimator(name: str) -> Estimator:
    """The estimator called `name`, or given as ``module:attribute``.

    Raises:
        UserError: if there is none, or it is not an `Estimator`.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    found = plugins.find("estimator", name, ESTIMATORS)
    if isinstance(found, type):
        found = plugins.construct(f"estimator {name!r}", "without arguments", found, {})
    if not isinstance(found, Estimator):
        raise UserError(
            f"estimator {name!r} is {type(found).__name__}, expected an Estimator: decorate an equation with "
            "skillsd.objective.sampled_token or whole_distribution"
        )
    return found


@dataclass(frozen=True)
class Distillation:
    """L_SDL as a loss term's function. Reads the signals ``old_logprobs`` and ``teacher_logprobs``, and for an exact
    divergence ``teacher_distribution``.

    Attributes:
        estimator: a name for `find_estimator`. None computes only the metrics.
        clamp: a change to the method, off by default (None). If set, tokens with |l| above it get no gradient; they
            still count in the denominator, and the metric ``distil_clamped`` is their share.
    """

    estimator: str | None = "iw_k3"
    clamp: float | None = None

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        old = signals["old_logprobs"]
        teacher = TokenLogprobs(signals["teacher_logprobs"], signals.get("teacher_distribution"))
        ratio = log_difference(student.chosen, teacher.chosen)
        clamped = ratio.abs() > (math.inf if self.clamp is None else self.clamp)
        logged = {
            "teacher_log_ratio": ratio,
            "teacher_log_ratio_square": ratio.square(),  # with the mean, gives the variance
            "teacher_k3": iw_k3_value(log_difference(student.chosen, old), ratio),  # comparable between estimators
            "distil_clamped": clamped,
        }
        if self.estimator is None:
            return torch.zeros_like(ratio), logged
        keep = ~clamped
        kept = student.at(keep)
        terms = find_estimator(self.estimator).terms(kept, teacher.at(keep), old[keep])
        if not isinstance(terms, DistillationTerms):
            raise UserError(
                f"the estimator {self.estimator!r} returned {type(terms).__name__}, expected DistillationTerms"
            )
        per_token(terms.surrogate, f"the surrogate of the estimator {self.estimator!r}", len(kept.chosen))
        return terms.surrogate, {**logged, "distil_value": terms.value}
