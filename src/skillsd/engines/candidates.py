"""A distribution over a large vocabulary, coarse-grained: some candidates, and one bucket for everything else.

A divergence of two distributions coarse-grained by the same candidates is at most that of the whole ones (data
processing inequality), and the same where the bucket holds one token. `[tokens, k + 1]` is all that has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skillsd.engines.base import TokenSequence, TopK, TrainItem


def coarse_grain(logprobs: Tensor, candidates: Tensor) -> Tensor:
    """Log-probs of the candidates and, last, the log of the mass of all other tokens, with gradient.

    The rest is summed, not taken as 1 less the candidates, so it keeps its digits however small it is. Where it is
    truly 0 it is -inf, with a gradient of zero.

    Args:
        logprobs: normalised, ``[tokens, vocabulary]``.
        candidates: ids, distinct in each row, ``[tokens, k]``.

    Returns:
        ``[tokens, k + 1]``.
    """
    others = logprobs.scatter(1, candidates, -torch.inf)
    peak = others.detach().amax(1, keepdim=True)
    peak = peak.where(peak.isfinite(), 0.0)
    mass = (others - peak).exp().sum(1, keepdim=True)
    empty = mass == 0
    # Not logsumexp: where everything is -inf its gradient is nan, which a mask afterwards does not undo.
    rest = (mass.masked_fill(empty, 1.0).log() + peak).masked_fill(empty, -torch.inf)
    return torch.cat([logprobs.gather(1, candidates), rest], dim=1)


def top_k(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids ``[tokens, k]`` of the most likely tokens and the coarse-grained ``[tokens, k + 1]``."""
    check_k(k, logprobs.shape[1])
    ids = logprobs.topk(k, dim=1).indices
    return ids, coarse_grain(logprobs, ids)


def nothing(k: int) -> TopK:
    """Of a sequence in which nothing is marked."""
    return TopK(torch.empty(0), torch.empty(0, k, dtype=torch.int64), torch.empty(0, k + 1))


def whole_to_top_k(sequence: TokenSequence, logprobs: Tensor, k: int) -> TopK:
    """From the ``[marked, vocabulary]`` of one sequence."""
    if not sequence.marked:
        return nothing(k)
    marked = torch.tensor([t for t, m in zip(sequence.tokens, sequence.mask, strict=True) if m])
    return TopK(logprobs.gather(1, marked.unsqueeze(1)).squeeze(1), *top_k(logprobs, k))


def check_k(k: int, vocabulary: int) -> None:
    if not 1 <= k < vocabulary:
        raise ValueError(
            f"{k} candidates of a vocabulary of {vocabulary}: give at least 1 and fewer than all, or use the whole "
            "distribution"
        )


def check_candidates(batch: Sequence[TrainItem], vocabulary: int) -> None:
    """Before any forward pass, and where the ids are: on a GPU an id beyond the vocabulary ends the process."""
    given = [item.signals.get("candidates") for item in batch]
    for item, ids in zip(batch, given, strict=True):
        if ids is None or ids.ndim != 2 or len(ids) != item.sequence.marked or ids.dtype != torch.int64:
            got = "none" if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise ValueError(
                f"candidates must be int64 [{item.sequence.marked}, k] in this item of the batch; got {got}"
            )
        check_k(ids.shape[1], vocabulary)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(f"candidates {int(ids.min())} to {int(ids.max())} of a vocabulary of {vocabulary}")
    if len(counts := {ids.shape[1] for ids in given if ids is not None}) > 1:
        raise ValueError(f"the items of a batch need equally many candidates; got {sorted(counts)}")
