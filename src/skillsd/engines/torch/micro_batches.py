"""Group sequences into forward passes, so that shared prefixes are computed once and every pass fits into memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from skillsd.engines.base import TokenSequence
from skillsd.engines.torch.memory import is_out_of_memory

T = TypeVar("T")
log = logging.getLogger(__name__)


class MicroBatches:
    """Groups sequences into forward passes of at most `budget` tokens, halved when one does not fit into memory.

    The lower budget is kept: the next batch would not fit either.

    Args:
        find_budget: gives the budget when the first sequences come.
    """

    def __init__(self, find_budget: Callable[[], int]) -> None:
        self._find_budget, self._budget = find_budget, 0
        self._sequences = self._tokens = 0  # in the latest forward pass

    @property
    def budget(self) -> int:
        if not self._budget:
            self._budget = self._find_budget()
        return self._budget

    @budget.setter
    def budget(self, tokens: int) -> None:
        self._budget = tokens

    def of(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[list[int], list[int]]]:
        """As `micro_batches`."""
        for part, shared in micro_batches(sequences, self.budget):
            self._sequences = len(part)
            self._tokens = sum(len(sequences[i].tokens) for i in part) - sum(shared)
            yield part, shared

    def until_they_fit(self, compute: Callable[[], T], again: Callable[[], T]) -> T:
        """The result of `compute`, or of `again` with a lower budget if `compute` runs out of memory.

        Raises:
            RuntimeError: as raised by torch, if a pass with a single sequence does not fit.
        """
        call = compute
        while True:
            self._sequences = 0
            try:
                return call()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self._sequences < 2:
                    raise
            # Outside the except block, where the exception no longer refers to the failed pass's activations.
            free_memory()
            self.lower(self._tokens)
            call = again

    def lower(self, tokens: int) -> None:
        """Halve the budget, since a pass of this many tokens did not fit."""
        self.budget = max(1, min(self.budget, tokens) // 2)
        log.warning(
            "out of memory in a forward pass of %d tokens: repeated with training.micro_batch_tokens=%d, which "
            "applies from here on",
            tokens,
            self.budget,
        )


def free_memory() -> None:
    """Free what a failed pass has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def micro_batches(sequences: Sequence[TokenSequence], budget: int) -> Iterator[tuple[list[int], list[int]]]:
    """For each forward pass, the indices of its sequences, and the length of the prefix each shares with the previous.

    Shared prefixes are computed once, so sequences with the same prompt stay together. Prompts are sorted by their
    longest sequence. Sequences without marks are left out.

    Args:
        budget: the most tokens of one pass; a longer sequence gets a pass of its own. Shared tokens and padding count
            half.
    """
    prompts: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        if sequence.marked:
            prompts.setdefault(sequence.tokens[: sequence.mask.index(True)], []).append(i)
    groups = sorted(prompts.values(), key=lambda group: max(len(sequences[i].tokens) for i in group))
    part: list[int] = []
    shared: list[int] = []
    size = longest = 0
    for i in [i for group in groups for i in sorted(group, key=lambda i: sequences[i].tokens)]:
        tokens = sequences[i].tokens
        common = common_prefix(sequences[part[-1]].tokens, tokens) if part else 0
        longest = max(longest, len(tokens))
        too_many = size + len(tokens) - common > budget
        if part and (too_many or longest * (len(part) + 1) > 2 * budget):
            yield part, shared
            part, shared, size, longest, common = [], [], 0, len(tokens), 0
        part.append(i)
        shared.append(common)
        size += len(tokens) - common
    if part:
        yield part, shared


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix of two sequences, by bisection."""
    same, differs = 0, min(len(a), len(b)) + 1  # invariant: a[:same] == b[:same], a[:differs] != b[:differs]
    while differs - same > 1:
        middle = (same + differs) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            differs = middle
    return same
