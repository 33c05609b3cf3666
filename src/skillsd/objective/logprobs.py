"""Log-probs of action tokens, and how much of the distribution a loss needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Want:
    """Which log-probs are needed at each marked token.

    Attributes:
        kind: ``chosen``: of the token itself only. ``top_k``: also of `k` candidate tokens and of all others together.
            ``whole``: also of the whole vocabulary.
        k: number of candidates, for ``top_k`` only.
    """

    kind: Literal["chosen", "top_k", "whole"] = "chosen"
    k: int | None = None

    def __post_init__(self) -> None:
        if (self.kind == "top_k") != (self.k is not None):
            raise ValueError(f"kind is {self.kind!r} and k is {self.k}: k must be given for 'top_k', and only for it")


CHOSEN = Want("chosen")
WHOLE = Want("whole")


def top_k(k: int) -> Want:
    """The `k` most likely tokens and one bucket for the rest."""
    return Want("top_k", k)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs at the marked tokens of one or more sequences, under one policy.

    Attributes:
        chosen: of the marked tokens, ``[tokens]``.
        distribution: of the whole vocabulary, normalised, ``[tokens, vocab]``. With `candidates`: of these and, last,
            of all other tokens together, ``[tokens, k + 1]``. None if only `chosen` was requested.
        candidates: token ids, int64 ``[tokens, k]``, the teacher's most likely first.
    """

    chosen: Tensor
    distribution: Tensor | None = None
    candidates: Tensor | None = None

    def at(self, mask: Tensor) -> TokenLogprobs:
        """Only the tokens that the boolean `mask` ``[tokens]`` selects."""
        if bool(mask.all()):
            return self  # avoids a copy of [tokens, vocab]
        selected = [None if x is None else x[mask] for x in (self.distribution, self.candidates)]
        return TokenLogprobs(self.chosen[mask], *selected)


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32; leave float32 and float64 unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def log_difference(logprobs: Tensor, others: Tensor) -> Tensor:
    """The difference of two log-probs in at least float32, without gradient."""
    return at_least_float32(logprobs.detach()) - at_least_float32(others.detach())
