"""Log-probs of action tokens, and how much of the distribution a caller wants of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Want:
    """Which log-probs are wanted at each place beside that of the token which stands there.

    Attributes:
        kind: ``chosen``: none. ``top_k``: of `k` candidate tokens, and the total of all others. ``whole``: of the whole
            vocabulary.
        k: number of candidates, for ``top_k`` only.
    """

    kind: Literal["chosen", "top_k", "whole"] = "chosen"
    k: int | None = None

    def __post_init__(self) -> None:
        if (self.kind == "top_k") != (self.k is not None):
            raise ValueError(f"k is {self.k}, but {self.kind!r} log-probs are wanted: k belongs to 'top_k'")


CHOSEN = Want("chosen")
WHOLE = Want("whole")


def top_k(k: int) -> Want:
    """The `k` most likely tokens and one bucket for the rest."""
    return Want("top_k", k)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs at the marked places of one or more sequences, under one policy.

    Attributes:
        chosen: of the tokens that stand there, ``[tokens]``.
        distribution: of the whole vocabulary, normalised, ``[tokens, vocab]``; with `candidates`, of those and, last,
            the log of the total probability of all other tokens, ``[tokens, k + 1]``. None if only `chosen` was wanted.
        candidates: token ids, int64 ``[tokens, k]``, in the teacher's order: most likely first.
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
    """Half precision widened to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def log_difference(logprobs: Tensor, others: Tensor) -> Tensor:
    """The difference of two log-probs in at least float32, without gradient."""
    return at_least_float32(logprobs.detach()) - at_least_float32(others.detach())
