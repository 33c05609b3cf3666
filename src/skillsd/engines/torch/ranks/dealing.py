"""Which rank takes which micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from skillsd.engines.base import TokenSequence
from skillsd.engines.torch.micro_batches import micro_batches

Part = tuple[list[int], list[int]]
"""The indices of a micro-batch's sequences, and the length of the prefix each shares with the previous."""


def hands(sequences: Sequence[TokenSequence], budget: int, ranks: int) -> list[list[Part]]:
    """Each rank's micro-batches, the longest first; empty where there are fewer than ranks.

    Cut as in one process, so that prompts stay shared, but into at least as many as there are ranks.

    Args:
        budget: the most tokens of a micro-batch.
    """
    tokens = sum(_tokens(sequences, part) for part in micro_batches(sequences, 1 << 60))
    share = -(-tokens // ranks)
    dealt: list[list[Part]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    parts = list(micro_batches(sequences, max(1, min(budget, share))))
    for part in sorted(parts, key=lambda part: _tokens(sequences, part), reverse=True):
        least = loads.index(min(loads))
        dealt[least].append(part)
        loads[least] += _tokens(sequences, part)
    return dealt


def _tokens(sequences: Sequence[TokenSequence], part: Part) -> int:
    """Tokens that a pass computes."""
    return sum(len(sequences[i].tokens) for i in part[0]) - sum(part[1])
