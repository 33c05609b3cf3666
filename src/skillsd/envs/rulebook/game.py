"""The rules of the rulebook: what is right in a world, and how an action is answered."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from skillsd.envs.base import Step
from skillsd.envs.rulebook.language import COLOURS, SIGNS, Rules, Words
from skillsd.seeds import derive_seed
from skillsd.types import Message

NAME = "rulebook"


def world_rules(world: int | str) -> dict[str, str]:
    """The rules of a world: a random colour for each sign."""
    random_ = random.Random(derive_seed("rulebook", world))
    return {sign: COLOURS[int(random_.random() * len(COLOURS))] for sign in SIGNS}


@dataclass(frozen=True)
class Game:
    """The rules of an episode.

    Attributes:
        partial: whether the reward is the share of right answers; otherwise it is 1 for a success and 0 for the rest.
        telling: whether a wrong answer is told the right one.
    """

    rules: Rules
    words: Words
    partial: bool = False
    telling: bool = True

    def begin(self, signs: Sequence[str]) -> tuple[Message, ...]:
        return (Message("user", self.words.prompt(signs[0], len(signs))),)

    def step(self, signs: Sequence[str], turn: int, before: int, action: str) -> Step:
        """The answer to the action at a turn, with `before` right answers so far.

        An action that names no colour is a wrong answer: the episode goes on with the next sign.
        """
        sign, said = signs[turn], self.words.answer(action)
        colour = self.rules[sign]
        right, done = said == colour, turn + 1 == len(signs)
        told = colour if right or self.telling else None
        share = (before + right) / len(signs)
        observation = self.words.observation(
            right=right, told=told, sign=sign, following=None if done else signs[turn + 1]
        )
        reward = share if self.partial else float(share == 1)
        info = {"sign": sign, "said": said, "right": right, "colour": told}
        return Step(observation, done, reward, share == 1, info)
