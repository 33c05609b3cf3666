"""A summariser that writes the rules of another world: as long, as confident, and wrong. A control of the study."""

from skillsd.envs.rulebook.game import world_rules
from skillsd.envs.rulebook.language import WORDINGS
from skillsd.types import Skill, Trajectory

RULES = world_rules("another")


def another_world(trajectory: Trajectory) -> Skill | None:
    """The rules of the signs that the episode showed the colour of, in a world that no run is in."""
    shown = [turn.info["sign"] for turn in trajectory.turns if turn.info["colour"]]
    return Skill("", "", WORDINGS["terse"].rules([(sign, RULES[sign]) for sign in shown])) if shown else None
