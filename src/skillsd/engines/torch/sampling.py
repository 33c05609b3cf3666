"""Sample tokens from logits, in a way that depends on one row's logits and random number only."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def choose(logits: Tensor, temperatures: list[float], uniforms: list[float]) -> tuple[list[int], list[float]]:
    """Sample one token per row: the inverse of the cumulative distribution at the row's uniform number.

    The choice depends only on the row's logits and number, so an episode samples the same tokens in any batch.
    Temperature 0 takes the most likely token and reports its log-prob at temperature 1.

    Args:
        logits: ``[rows, vocab]``.
        temperatures: one per row.
        uniforms: one per row, in [0, 1).

    Returns:
        The ids and their log-probs under the sampling distribution (in float32), one per row.

    Raises:
        FloatingPointError: if a row has nan or infinity among its logits. (Some may be minus infinity.)
    """
    device = logits.device
    ids, logprobs = pick(
        logits,
        torch.tensor(temperatures, device=device),
        torch.tensor(uniforms, dtype=torch.float64, device=device),
        greedy=not all(t > 0 for t in temperatures),
    )
    chosen: list[float] = logprobs.tolist()
    check_finite(chosen)
    return ids.tolist(), chosen


def check_finite(logprobs: list[float]) -> None:
    """Raise FloatingPointError for a nan among chosen tokens' log-probs: one bad logit makes its whole row nan."""
    if any(map(math.isnan, logprobs)):
        raise FloatingPointError("logits are nan or infinite")


def pick(logits: Tensor, temperatures: Tensor, uniforms: Tensor, *, greedy: bool = True) -> tuple[Tensor, Tensor]:
    """`choose` with tensors on the logits' device, without waiting for it; nan as log-prob instead of an error.

    Args:
        temperatures: float32 ``[rows]``.
        uniforms: float64 ``[rows]``.
        greedy: whether some temperature may be 0.

    Returns:
        ids and log-probs, ``[rows]`` each.
    """
    # A division, as in scoring: multiplying by 1 / t rounds differently, by 1e-5 where t is small.
    divisor = torch.where(temperatures > 0, temperatures, 1.0) if greedy else temperatures
    logprobs = torch.log_softmax(logits.float() / divisor.unsqueeze(1), dim=-1)
    # float64: a float32 running sum over 150k tokens would lose the small probabilities at its end.
    cumulative = torch.cumsum(logprobs.double().exp(), dim=-1)
    target = uniforms.unsqueeze(1) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    if greedy:
        ids = torch.where(temperatures.unsqueeze(1) > 0, ids, logprobs.argmax(dim=-1, keepdim=True))
    return ids.squeeze(1), logprobs.gather(1, ids).squeeze(1)
