"""Demonstrations for the warm start: a policy that knows no rule, but reads those in its prompt.

Every demonstration is from a world of its own. What is to be learnt is the game's language and to follow a skill.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

from skillsd.envs.demonstration_options import check_count, check_share, chosen
from skillsd.envs.rulebook.game import NAME, Game
from skillsd.envs.rulebook.language import COLOURS, SIGNS, Words
from skillsd.types import TRAIN_SPLIT, Demonstration, DemonstrationTurn, Skill, Task

MOST_OTHERS = 4
"""Maximum number of a skill's signs that don't occur in the episode."""


@dataclass(frozen=True)
class Options:
    """Composition of the demonstrations. Shares are in [0, 1].

    Attributes:
        skill_share: share with a skill in the prompt.
        mistake_share: of these, the share whose skill says what is wrong instead of what is right.
        whole_share: of the others, the share whose skill covers every sign of the episode.
        other_share: share of the skills that also have rules for some signs that don't occur. Without them, colours
            could be told by elimination.
        length: maximum number of signs in an episode. Short ones are where reading is learnt first.
    """

    skill_share: float = 0.9
    mistake_share: float = 0.1
    whole_share: float = 0.9
    other_share: float = 0.5
    length: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "length":
                check_share(field.name, getattr(self, field.name))
        check_count("length", self.length, len(SIGNS))


def demonstrate(
    words: Words, seed: int, *, avoid: Collection[frozenset[str]] = (), **options: float
) -> Iterator[Demonstration]:
    """The infinite stream of demonstrations, deterministic given the arguments. See `Options`.

    Args:
        avoid: sets of signs that no demonstration has, those of held-out tasks.

    Raises:
        UserError: for an unknown option or an invalid value.
    """
    return _stream(words, random.Random(seed), avoid, chosen(Options, options))


def _stream(
    words: Words, random_: random.Random, avoid: Collection[frozenset[str]], options: Options
) -> Iterator[Demonstration]:
    while True:
        rules = {sign: random_.choice(COLOURS) for sign in SIGNS}
        signs = random_.sample(SIGNS, random_.randint(1, options.length))
        if frozenset(signs) in avoid:
            continue
        skill, known, excluded = None, dict[str, str](), dict[str, str]()
        if random_.random() < options.skill_share:
            told = _told(signs, random_, options)
            if random_.random() < options.mistake_share:
                excluded = {sign: random_.choice([c for c in COLOURS if c != rules[sign]]) for sign in told}
                skill = Skill("", words.exclusions(list(excluded.items())), "")
            else:
                known = {sign: rules[sign] for sign in told}
                skill = Skill("", "", words.rules(list(known.items())))
        game, right = Game(rules, words), 0
        turns: list[DemonstrationTurn] = []
        for turn, sign in enumerate(signs):
            guess = random_.choice([colour for colour in COLOURS if colour != excluded.get(sign)])
            step = game.step(signs, turn, right, action := known.get(sign, guess))
            right += step.info["right"]
            turns.append(DemonstrationTurn(action, step.observation))
        task = Task("demonstration", NAME, TRAIN_SPLIT, {"signs": signs})
        yield Demonstration(task, game.begin(signs), tuple(turns), skill)


def _told(signs: Sequence[str], random_: random.Random, options: Options) -> list[str]:
    """The signs that the skill is about, in random order."""
    whole = random_.random() < options.whole_share
    told = list(signs) if whole else random_.sample(signs, random_.randint(1, len(signs)))
    others = [sign for sign in SIGNS if sign not in signs]
    if others and random_.random() < options.other_share:
        told += random_.sample(others, random_.randint(1, min(MOST_OTHERS, len(others))))
    random_.shuffle(told)
    return told
