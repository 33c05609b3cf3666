"""Rules that pick one of a task's skills for the teacher's prompt: the paper's UCB, and simpler ones for comparison.

They are pure functions of the skills' statistics. The paper gives neither UCB's c (``skills.ucb_c``; the default,
sqrt 2, is a second-hand value) nor the order among skills that were never picked (`pick`; ours).
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from skillsd import plugins, user_code
from skillsd.errors import UserError
from skillsd.seeds import derive_seed


class Arm(Protocol):
    """The statistics that a rule may use, as of `skillsd.skills.bank.StoredSkill`."""

    @property
    def id(self) -> int: ...
    @property
    def picks(self) -> int: ...
    @property
    def mean_reward(self) -> float: ...
    @property
    def source_reward(self) -> float: ...


PickingRule = Callable[[Sequence[Arm], float], int | None]
"""(a task's skills, oldest first and at least one; UCB's c) -> index of the one to use, or None for no skill."""


def ucb_score(mean_reward: float, picks: int, total_picks: int, c: float) -> float:
    """score(e) = mean_reward(e) + c * sqrt(ln N / n(e)), with n = `picks` >= 1 and N = `total_picks` >= n."""
    if not 1 <= picks <= total_picks:
        raise ValueError(f"expected 1 <= picks <= total_picks, got picks={picks}, total_picks={total_picks}")
    return mean_reward + c * math.sqrt(math.log(total_picks) / picks)


def pick(arms: Sequence[Arm], c: float) -> int:
    """UCB: index of an arm that was never picked if there is one, otherwise of the highest `ucb_score`.

    N is the sum of the arms' picks. Ties, also among arms that were never picked, go to the newest (the last in
    `arms`), which was written from the most recent policy's behaviour. Oldest first would work through a growing
    backlog of skills from early policies, since every visit adds up to G skills and picks one.

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


def pick_with_prior(arms: Sequence[Arm], c: float) -> int:
    """UCB in which the reward of the trajectory that a skill was written from counts as one pick of it.

    Under the paper's rule every new skill comes before all tried ones, and a visit writes more skills than it picks:
    nearly every pick is a first pick, and the rewards decide little. Ties go to the newest.
    """

    def mean(arm: Arm) -> float:
        return (arm.picks * arm.mean_reward + arm.source_reward) / (arm.picks + 1)

    total = sum(arm.picks + 1 for arm in arms)
    return max(range(len(arms)), key=lambda i: (ucb_score(mean(arms[i]), arms[i].picks + 1, total, c), i))


def best(arms: Sequence[Arm], c: float) -> int:
    """The highest mean reward, without exploration; ties go to the newest."""
    return max(range(len(arms)), key=lambda index: (arms[index].mean_reward, index))


def last(arms: Sequence[Arm], c: float) -> int:
    """The newest skill, regardless of its statistics."""
    return len(arms) - 1


def random_rule(seed: int) -> PickingRule:
    """A uniformly random skill. The draw depends only on `seed` and the arms, so a resumed run draws the same."""

    def choose(arms: Sequence[Arm], c: float) -> int:
        # Ids are never reused and every pick changes the sum, so each pick has a seed of its own.
        state = (arms[-1].id, sum(arm.picks for arm in arms))
        return random.Random(derive_seed(seed, "skill-policy", *state)).randrange(len(arms))

    return choose


def choose(rule: PickingRule, arms: Sequence[Arm], c: float) -> int | None:
    """The rule's choice: the index of one of `arms`, or None.

    Raises:
        UserError: if the rule, which may be a user's own, raises or returns anything else.
    """
    name = getattr(rule, "__qualname__", type(rule).__qualname__)
    try:
        given = rule(arms, c)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        user_code.record(f"the picking rule {name!r}", error)
        raise UserError(f"the picking rule {name!r} raised {user_code.describe(error)}") from error
    # A numpy integer is an index as well; True is none.
    index = None if given is None or isinstance(given, bool) else _index(given)
    if given is not None and (index is None or not 0 <= index < len(arms)):
        place = user_code.defined(rule if hasattr(rule, "__code__") else type(rule).__call__)
        raise UserError(
            f"the picking rule {name!r} returned {given!r:.80} for {len(arms)} skills, expected an index from 0 to "
            f"{len(arms) - 1}, or None for no skill{f' ({place})' if place else ''}"
        )
    return index


def _index(given: object) -> int | None:
    try:
        return operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        return None


def picking_rule(name: str, *, seed: int = 0) -> PickingRule:
    """The rule called `name`: ``ucb``, ``random``, ``last``, ``best``, or your own as ``module:function`` or
    ``module:Class`` (constructed without arguments; its instances are called).

    Args:
        seed: of the rule ``random``.

    Raises:
        UserError: if there is no such rule, or it is not callable.
    """
    rules: dict[str, PickingRule] = {
        "ucb": pick,
        "ucb-prior": pick_with_prior,
        "random": random_rule(seed),
        "last": last,
        "best": best,
    }
    if name in rules:
        return rules[name]
    found = plugins.find("picking rule", name, rules)
    if isinstance(found, type):
        found = plugins.construct(f"picking rule {name!r}", "without arguments", found, {})
    if not callable(found):
        raise UserError(f"picking rule {name!r} is {type(found).__name__}, expected a function (skills, c) -> index")
    rule: PickingRule = found
    return rule
