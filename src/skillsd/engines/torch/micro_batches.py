"""Group sequences into forward passes, so that shared prefixes are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from skillsd.engines.base import TokenSequence


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
