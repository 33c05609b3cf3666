"""Which iterations' episodes are put into a report: a rule that depends on nothing but their numbers and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAX_EPISODES = 5_000
"""Default limit of the episodes in a report, all runs together."""

MAX_TOKENS = 2_500_000
"""Limit of the tokens in a report, all runs together: about 20 MB."""

MAX_SKILLS = 2_000
"""Limit of the skills of one run in a report: those that were picked most often."""


def sampled(sizes: Mapping[int, tuple[int, int]], *, episodes: int, tokens: int) -> list[int]:
    """The iterations to show, ascending: as many as fit, evenly spaced, the first and the last among them.

    Args:
        sizes: iteration -> (its episodes, its tokens).
        episodes, tokens: how many fit. One iteration is shown even if it is larger; none for 0 episodes.
    """
    if not episodes:
        return []
    numbers = sorted(sizes)
    for count in range(len(numbers), 1, -1):
        chosen = spread(numbers, count)
        if all(sum(sizes[n][part] for n in chosen) <= limit for part, limit in enumerate((episodes, tokens))):
            return chosen
    return numbers[-1:]


def spread(items: Sequence[int], count: int) -> list[int]:
    """`count` >= 2 of `items`, evenly spaced, with the first and the last."""
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def in_words(shown: Sequence[int], recorded: Sequence[int], finished: int, every: int) -> str:
    """The rule as the page states it.

    Args:
        shown: the iterations on the page.
        recorded: the iterations whose episodes the run has written.
        finished: number of finished iterations.
        every: ``log.trajectories_every``.
    """
    if not recorded:
        return "The run wrote no episodes" + (" (log.trajectories_every is 0)." if not every else " yet.")
    written = f"{len(recorded)} of {finished} iterations (log.trajectories_every is {every})"
    if len(shown) == len(recorded):
        return f"The episodes of {written}: all that the run wrote."
    return (
        f"The episodes of {len(shown)} iterations, of the {written} that were written: evenly spaced, the first and "
        "the last included. More: skillsd report --episodes N."
    )
