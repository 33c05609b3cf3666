"""Which skill of a task's bank the teacher gets: UCB, the paper's, or a simpler rule for comparison.

Pure functions of the skills' statistics. The paper gives neither UCB's c nor the order among skills that were never
picked; both choices are ours and are marked where they are made.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from skillsd import plugins
from skillsd.errors import UserError
from skillsd.seeds import derive_seed


class Arm(Protocol):
    """What a policy may look at: a `skillsd.skills.bank.StoredSkill`, or anything of its shape."""

    @property
    def id(self) -> int: ...
    @property
    def picks(self) -> int: ...
    @property
    def mean_reward(self) -> float: ...


PickingRule = Callable[[Sequence[Arm], float], int | None]
"""(a task's skills, oldest first; UCB's c) -> index of the one to use, or None for no skill this time."""


def ucb_score(mean_reward: float, picks: int, total_picks: int, c: float) -> float:
    """score(e) = mean_reward(e) + c * sqrt(ln N / n(e)), with n = `picks` >= 1 and N = `total_picks` >= n."""
    if not 1 <= picks <= total_picks:
        raise ValueError(f"expected 1 <= picks <= total_picks, got picks={picks}, total_picks={total_picks}")
    return mean_reward + c * math.sqrt(math.log(total_picks) / picks)


def pick(arms: Sequence[Arm], c: float) -> int:
    """Index of the arm to use: one never picked if there is any, otherwise the highest `ucb_score`.

    N is the sum of the arms' picks. Ties, those among arms never picked too, go to the newest (the last in
    `arms`): it was written from the most recent policy's behaviour, while oldest-first would have the teacher
    work through a backlog of the base model's lessons, as every visit adds up to G skills and picks one.

    Raises:
        ValueError: if there are no arms.
    """
    if not arms:
        raise ValueError("pick needs at least one arm")
    total = sum(arm.picks for arm in arms)

    def rank(index: int) -> tuple[float, int]:
        arm = arms[index]
        score = ucb_score(arm.mean_reward, arm.picks, total, c) if arm.picks else math.inf
        return score, index

    return max(range(len(arms)), key=rank)


def best(arms: Sequence[Arm], c: float) -> int:
    """The highest mean reward, nothing explored; ties go to the newest."""
    return max(range(len(arms)), key=lambda index: (arms[index].mean_reward, index))


def last(arms: Sequence[Arm], c: float) -> int:
    """The newest skill, whatever its record."""
    return len(arms) - 1


def random_rule(seed: int) -> PickingRule:
    """A skill at random. The draw depends on `seed` and the arms alone, so a resumed run draws the same."""

    def choose(arms: Sequence[Arm], c: float) -> int:
        # Ids are never used twice and a pick changes the sum: no two picks of a bank share a state.
        state = (arms[-1].id, sum(arm.picks for arm in arms))
        return random.Random(derive_seed(seed, "skill-policy", *state)).randrange(len(arms))

    return choose


def picking_rule(name: str, *, seed: int = 0) -> PickingRule:
    """The rule called `name`: ``ucb``, ``random`` (which alone uses `seed`), ``last``, ``best``, or ``module:Class``
    (made without arguments) or ``module:function`` of a user's own.

    Raises:
        UserError: if there is no such rule.
    """
    rules: dict[str, PickingRule] = {"ucb": pick, "random": random_rule(seed), "last": last, "best": best}
    if name in rules:
        return rules[name]
    found = plugins.find("picking rule", name, rules)
    rule: PickingRule = found() if isinstance(found, type) else found
    if not callable(rule):
        raise UserError(f"picking rule {name!r} is {type(rule).__name__}, expected a function (skills, c) -> index")
    return rule
