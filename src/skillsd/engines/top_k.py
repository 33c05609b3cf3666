"""A distribution over a large vocabulary, coarse-grained: some candidates, and one bucket for everything else.

A divergence between two distributions that are coarse-grained by the same candidates is at most that of the whole ones
(data processing inequality), and equal to it if the bucket holds one token. Only ``[tokens, k + 1]`` has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skillsd.engines.base import TrainItem
from skillsd.objective.logprobs import TokenLogprobs, Want


def coarse_grain(logprobs: Tensor, candidates: Tensor) -> Tensor:
    """Log-probs of the candidates and, last, the log of the total probability of all other tokens, with gradient.

    The rest is summed, not computed as 1 minus the candidates, so it keeps its digits however small it is. Where it is
    exactly 0 it is -inf, with a gradient of zero.

    Args:
        logprobs: normalised, ``[tokens, vocab]``.
        candidates: ids, distinct in each row, ``[tokens, k]``.

    Returns:
        ``[tokens, k + 1]``.
    """
    others = logprobs.scatter(1, candidates, -torch.inf)
    peak = others.detach().amax(1, keepdim=True)
    peak = peak.where(peak.isfinite(), 0.0)
    mass = (others - peak).exp().sum(1, keepdim=True)
    empty = mass == 0
    # Not logsumexp: where everything is -inf its gradient is nan, and a mask afterwards does not remove it.
    rest = (mass.masked_fill(empty, 1.0).log() + peak).masked_fill(empty, -torch.inf)
    return torch.cat([logprobs.gather(1, candidates), rest], dim=1)


def top_k(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids ``[tokens, k]`` of the most likely tokens and the coarse-grained ``[tokens, k + 1]``."""
    check_k(k, logprobs.shape[1])
    ids = logprobs.topk(k, dim=1).indices
    return ids, coarse_grain(logprobs, ids)


def select(logprobs: Tensor, tokens: Tensor, want: Want) -> TokenLogprobs:
    """The log-probs that `want` asks for, from the whole distribution ``[tokens, vocab]`` and the chosen ids."""
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    if want.kind == "chosen":
        return TokenLogprobs(chosen)
    if want.kind == "whole":
        return TokenLogprobs(chosen, logprobs)
    assert want.k is not None
    ids, coarse = top_k(logprobs, want.k)
    return TokenLogprobs(chosen, coarse, ids)


def nothing(want: Want, vocabulary: int) -> TokenLogprobs:
    """Empty log-probs, for a sequence without marks."""
    return select(torch.empty(0, vocabulary), torch.empty(0, dtype=torch.int64), want)


def check_k(k: int | None, vocabulary: int) -> None:
    """Raise ValueError unless there are between 1 and vocabulary - 1 candidates."""
    if k is None or not 1 <= k < vocabulary:
        raise ValueError(
            f"{k} candidates from a vocabulary of {vocabulary}: expected at least 1 and fewer than all; for all, use "
            "the whole distribution"
        )


def check_candidates(batch: Sequence[TrainItem], vocabulary: int) -> None:
    """Raise ValueError for bad candidates before any forward pass: on a GPU, an id out of range crashes the process."""
    given = [item.signals.get("candidates") for item in batch]
    for item, ids in zip(batch, given, strict=True):
        if ids is None or ids.ndim != 2 or len(ids) != item.sequence.marked or ids.dtype != torch.int64:
            got = "none" if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise ValueError(
                f"candidates must be int64 [{item.sequence.marked}, k] in this item of the batch; got {got}"
            )
        check_k(ids.shape[1], vocabulary)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"candidates have ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {vocabulary - 1}"
            )
    if len(counts := {ids.shape[1] for ids in given if ids is not None}) > 1:
        raise ValueError(f"all items of a batch need the same number of candidates; got {sorted(counts)}")
