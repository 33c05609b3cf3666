"""Log-probs of the chosen tokens from logits, without keeping a float32 copy of the logits for the backward pass.

Log-softmax and gather by autograd keep the log-probs of the whole vocabulary, and the gradient takes two more tensors
of their size. Here the gradient overwrites the log-probs (on a CPU), or only the logits are kept, in the model's dtype,
and each pass over them is one kernel (on a GPU, by `torch.compile`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skillsd.engines.torch.memory import is_out_of_memory

log = logging.getLogger(__name__)

COMPILE_FROM = 2**24
"""From this many logits on, passes over them are compiled: that takes seconds, once."""

PIECE = 2**24
"""The most logits at a time that passes without compilation convert to float32."""


def chosen_logprobs(logits: Tensor, targets: Tensor, vocabulary: int, temperature: float) -> Tensor:
    """Log-probs of `targets` at a temperature, with gradient.

    Args:
        logits: ``[tokens, at least vocabulary]``; only the first `vocabulary` stand for tokens.
        targets: ids ``[tokens]``.

    Returns:
        float32 ``[tokens]``.
    """
    form = _LogitsKept if logits.is_cuda else _LogprobsKept
    found: Tensor = form.apply(logits, targets, vocabulary, temperature)
    return found


class _LogprobsKept(torch.autograd.Function):
    """Fast on a CPU: its log-softmax is one pass over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocabulary: int, temperature: float) -> Tensor:
        scores = logits[:, :vocabulary].float()
        if temperature != 1:
            scores = scores / temperature
        logprobs, targets = F.log_softmax(scores, dim=-1), targets.unsqueeze(1)
        ctx.save_for_backward(logprobs, targets)
        ctx.temperature, ctx.dtype, ctx.unused = temperature, logits.dtype, logits.shape[1] - vocabulary
        return logprobs.gather(1, targets).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, targets = ctx.saved_tensors
        of_chosen = grads[0].unsqueeze(1)
        grad = logprobs.exp_().mul_(-of_chosen).scatter_add_(1, targets, of_chosen)
        if ctx.temperature != 1:
            grad.div_(ctx.temperature)
        grad = grad.to(ctx.dtype)
        return F.pad(grad, (0, ctx.unused)) if ctx.unused else grad, None, None, None


class _LogitsKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocabulary: int, temperature: float) -> Tensor:
        divisor = torch.full((), temperature, device=logits.device)
        chosen, total = _pass(_scores, (logits, targets), divisor, vocabulary)
        ctx.save_for_backward(logits, targets, total, divisor)
        ctx.vocabulary = vocabulary
        return chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, total, divisor = ctx.saved_tensors
        (grad,) = _pass(_gradient, (logits, targets, total, grads[0]), divisor, ctx.vocabulary)
        return grad, None, None, None


def _scores(logits: Tensor, targets: Tensor, divisor: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets, and the log of the sum of all exponentials. float32 ``[tokens]``."""
    scores = logits[:, :vocabulary].float() / divisor
    total = scores.logsumexp(dim=-1)
    return scores.gather(1, targets.unsqueeze(1)).squeeze(1) - total, total


def _gradient(
    logits: Tensor, targets: Tensor, total: Tensor, grad: Tensor, divisor: Tensor, vocabulary: int
) -> tuple[Tensor]:
    """Gradient of the logits, in their dtype, from that of the targets' log-probs ``[tokens]``."""
    place = torch.arange(logits.shape[1], device=logits.device)
    probabilities = (logits.float() / divisor - total.unsqueeze(1)).exp()
    found = ((place == targets.unsqueeze(1)).float() - probabilities) * (grad / divisor).unsqueeze(1)
    if vocabulary < logits.shape[1]:
        found = found.masked_fill(place >= vocabulary, 0.0)
    return (found.to(logits.dtype),)


def _pass(function: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, ...]:
    """``function(*rows, *rest)``, compiled if it is large and that works, else some rows at a time."""
    logits = rows[0]
    if logits.is_cuda and logits.numel() >= COMPILE_FROM and not _failed:
        try:
            return _compiled(function)(*rows, *rest)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            _failed.append((str(error).strip() or type(error).__name__).splitlines()[0][:200])
            log.warning("chosen tokens' log-probs are computed without torch.compile, which failed: %s", _failed[0])
    size = max(1, PIECE // logits.shape[1])
    parts = [function(*part, *rest) for part in zip(*(x.split(size) for x in rows), strict=True)]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


@functools.cache
def _compiled(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(function, dynamic=True)


_failed: list[str] = []
"""Why compiling failed; after that it is not tried again."""
