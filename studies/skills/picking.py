"""A picking rule for the study: the skill with the lowest mean reward, as a lower bound."""

from collections.abc import Sequence

from skillsd.skills.ucb import Arm


def worst(skills: Sequence[Arm], c: float) -> int:
    return min(range(len(skills)), key=lambda index: (skills[index].mean_reward, -index))
