"""Losses of your own: a new estimator of the divergence, and a new term, each one function and one line of a recipe.

    cd examples
    skillsd train sokoban-nano objective.estimator=custom_loss:gated_iw_k3
    skillsd train sokoban-nano 'objective.terms=[{name: entropy_bonus, fn: "custom_loss:surprise", weight: 0.001}]'

The signals that a term can read are listed in docs/engines.md. Everything is per action token, ``[tokens]``; the sum is
divided by the number of the term's tokens in the whole minibatch, so micro-batches don't change the gradient.
"""

from collections.abc import Mapping

from torch import Tensor

from skillsd.objective import TokenLogprobs, sampled_token
from skillsd.objective.distillation import iw_k3_value

GATE = 5.0


@sampled_token
def gated_iw_k3(log_rho: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's L_SDL, but only at tokens where teacher and student differ by less than `GATE` nats.

    Returns the weight of grad log pi, and the value to log.
    """
    gate = (log_ratio.abs() < GATE).to(log_ratio.dtype)
    return gate * log_rho.exp() * log_ratio, gate * iw_k3_value(log_rho, log_ratio)


def surprise(student: TokenLogprobs, signals: Mapping[str, Tensor]) -> Tensor:
    """An entropy bonus. Its gradient, rho * log pi * grad log pi, has the mean of the negative entropy's gradient.

    `student.chosen` are log-probs with gradient; `signals` are aligned with them.
    """
    rho = (student.chosen.detach() - signals["old_logprobs"]).exp()
    return rho * student.chosen.detach() * student.chosen
