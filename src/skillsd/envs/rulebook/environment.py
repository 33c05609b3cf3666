"""The rulebook: a world's hidden rules say which colour each sign has. All tasks of a world share them.

A positive control for skills. It has what makes a skill teach (docs/results/skills.md): tasks share knowledge, success
is rare, a failure tells what was missing, and a summary of a failure is worth reading. Each can be switched off.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.envs.rulebook.demonstrations import demonstrate
from skillsd.envs.rulebook.game import NAME, Game, world_rules
from skillsd.envs.rulebook.language import COLOURS, SIGNS, WORDINGS, Rules, Words
from skillsd.errors import UserError, unknown_name
from skillsd.seeds import derive_seed
from skillsd.types import TRAIN_SPLIT, Demonstration, Message, Skill, Task, Trajectory

REWARDS = ("success", "completion")
FAILURES = ("telling", "mute")

HELD_OUT = {"test": 128, "tune": 64}
"""Sizes of the held-out splits."""


MIN_LENGTH, MAX_LENGTH = 3, 6
"""Signs in an episode: with 2 there are too few different sets of them for the splits; 6 are many to get right."""


def splits_of(length: int, train: int) -> dict[str, list[tuple[str, ...]]]:
    """Split -> the signs of its tasks, in the order of the episode. The same in every world.

    No two tasks, in whatever splits, have the same set of signs. The held-out splits don't depend on `train`.
    """
    random_ = random.Random(derive_seed("rulebook", "tasks", length))
    sets = [(random_.random(), signs) for signs in itertools.combinations(SIGNS, length)]
    shuffled = [tuple(sorted(signs, key=lambda _: random_.random())) for _, signs in sorted(sets)]
    sizes, places = {**HELD_OUT, TRAIN_SPLIT: train}, iter(shuffled)
    return {split: list(itertools.islice(places, size)) for split, size in sizes.items()}


class RulebookEnvironment(Environment):
    """Runs one episode at a time."""

    def __init__(self, game: Game) -> None:
        self._world = game
        self._game = game
        self._signs: Sequence[str] = ()
        self._turn = self._right = 0

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Start the task. Nothing is random: the seed is unused. A practice task brings its own rules."""
        self._signs, self._turn, self._right = task.payload["signs"], 0, 0
        own = task.payload.get("rules")
        self._game = Game(own, self._world.words, self._world.partial, self._world.telling) if own else self._world
        return self._game.begin(self._signs)

    async def step(self, action: str) -> Step:
        if self._turn >= len(self._signs):
            raise RuntimeError("step() before reset()")
        step = self._game.step(self._signs, self._turn, self._right, action)
        self._turn, self._right = self._turn + 1, self._right + step.info["right"]
        return step


class Rulebook(TaskSet):
    """Name the colour of each sign. The world's rules are hidden, and the same in all tasks.

    Args:
        world: seed of the rules.
        reward: ``success``: 1 if every answer was right, else 0; ``completion``: the share of right answers.
        failures: ``telling``: a wrong answer is told the right one; ``mute``: only that it was wrong.
        words: ``terse``, for a tiny agent, or ``english``, for a language model.
        length: signs in an episode, one per turn.
        train: number of training tasks.

    Raises:
        UserError: for an unknown or impossible value.
    """

    name: ClassVar[str] = NAME

    def __init__(
        self,
        world: int = 0,
        reward: str = "success",
        failures: str = "telling",
        words: str = "terse",
        length: int = 4,
        train: int = 48,
    ) -> None:
        _check_choice("reward", reward, REWARDS)
        _check_choice("failures", failures, FAILURES)
        _check_choice("words", words, WORDINGS)
        _check_number("world", world, 0)
        _check_number("length", length, MIN_LENGTH, MAX_LENGTH)
        _check_number("train", train, 1)
        self.world, self.length, self.wording = world, length, words
        self._game = Game(world_rules(world), WORDINGS[words], reward == "completion", failures == "telling")
        signs = splits_of(length, train)
        if len(signs[TRAIN_SPLIT]) < train:
            raise UserError(
                f"rulebook option train is {train}; with length {length} there are {len(signs[TRAIN_SPLIT])} tasks"
            )
        self._tasks = {split: tuple(_task(one, split) for one in tasks) for split, tasks in signs.items()}
        self._held_out = {frozenset(one) for split in HELD_OUT for one in signs[split]}

    @property
    def splits(self) -> tuple[str, ...]:
        return (TRAIN_SPLIT, *reversed(HELD_OUT))

    @property
    def max_turns(self) -> int:
        return self.length

    @property
    def rules(self) -> Rules:
        """The world's rules."""
        return self._game.rules

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self._tasks:
            raise unknown_name("split of the rulebook", split, self.splits)
        return self._tasks[split]

    def rules_in_words(self) -> Mapping[str, Any]:
        words = self._game.words
        texts = [words.prompt("bell", self.length)] + [
            words.observation(right=right, told=told, sign="bell", following=following)
            for right, told in ((True, None), (False, "red"), (False, None))
            for following in ("drum", None)
        ]
        game = self._game
        return {"rules": dict(game.rules), "partial": game.partial, "telling": game.telling, "texts": texts}

    def make(self) -> Environment:
        return RulebookEnvironment(self._game)

    def summariser(self) -> Callable[[Trajectory], Skill | None]:
        """The rules that an episode has shown, or what it has ruled out."""
        return lambda trajectory: summarise(trajectory, self._game.words)

    def oracle(self, task: Task) -> str:
        """The rules of the task's signs, in the format of a skill's golden workflow."""
        return self._rules_of(task, self.rules)

    def wrong_skill(self, task: Task) -> Skill:
        """The rules of the task's signs in another world, as confident as the golden skill."""
        return Skill("", "", self._rules_of(task, world_rules(f"not {self.world}")))

    def skill_for_people(self, task: Task, skill: Skill) -> Skill:
        """Sentences instead of the terse words."""
        if self.wording == "english":
            return skill
        english = WORDINGS["english"]
        return Skill(
            skill.success_analysis,
            english.exclusions(_pairs(skill.mistake_analysis)),
            english.rules(_pairs(skill.golden_workflow)),
        )

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        """Episodes in random worlds, so that no world can be learnt by heart: see
        `skillsd.envs.rulebook.demonstrations.Options`.

        Raises:
            UserError: for a split other than ``train``, an unknown option or an invalid value.
        """
        if split != TRAIN_SPLIT:
            raise UserError(f"demonstrations are for the split {TRAIN_SPLIT!r} only; got {split!r}")
        return demonstrate(self._game.words, seed, avoid=self._held_out, **options)

    def practice(self, *, seed: int) -> tuple[Task, Skill]:
        """A task with rules of its own, and the skill that says them: without reading it, it can't be solved."""
        random_ = random.Random(derive_seed("rulebook", "practice", seed))
        signs = random_.sample(SIGNS, self.length)
        while frozenset(signs) in self._held_out:
            signs = random_.sample(SIGNS, self.length)
        rules = {sign: random_.choice(COLOURS) for sign in SIGNS}
        told = random_.sample(signs, len(signs))
        task = Task(f"practice-{seed}", NAME, TRAIN_SPLIT, {"signs": signs, "rules": rules})
        return task, Skill("", "", self._game.words.rules([(sign, rules[sign]) for sign in told]))

    def _rules_of(self, task: Task, rules: Rules) -> str:
        return self._game.words.rules([(sign, rules[sign]) for sign in task.payload["signs"]])


def summarise(trajectory: Trajectory, words: Words) -> Skill | None:
    """What an episode has shown, success or failure; None if that is nothing."""
    infos = [turn.info for turn in trajectory.turns]
    known = [(info["sign"], info["colour"]) for info in infos if info["colour"]]
    wrong = [(info["sign"], info["said"]) for info in infos if not info["colour"] and info["said"]]
    skill = Skill(
        success_analysis=f"all {len(infos)} answers were right" if trajectory.success else "",
        mistake_analysis=words.exclusions(wrong) if wrong else "",
        golden_workflow=words.rules(known) if known else "",
    )
    return None if skill.is_empty else skill


def _check_choice(option: str, given: object, known: Collection[object]) -> None:
    if given not in known:
        raise unknown_name(f"{option} of the rulebook", str(given), map(str, known))


def _check_number(option: str, given: object, least: int, most: int | None = None) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < least or (most is not None and given > most):
        expected = f"a whole number, at least {least}" if most is None else f"a whole number from {least} to {most}"
        raise UserError(f"rulebook option {option} is {given!r}; expected {expected}")


def _task(signs: Sequence[str], split: str) -> Task:
    return Task("-".join(signs), NAME, split, {"signs": list(signs)})


def _pairs(text: str) -> list[tuple[str, str]]:
    words = text.split()
    return list(zip(words[::2], words[1::2], strict=True))
