"""Episodes to imitate in the warm start: weak and strong play, with and without a skill to follow.

A base model for studying skills has to know three things before RL starts: the language of the environment,
a little of the game (mostly careless play, some of it expert), and how to follow a skill that stands in its
prompt. The levels are drawn fresh from the preset's distribution, and none of them is in any panel.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from skillsd.envs.sokoban import language
from skillsd.envs.sokoban.actors import Actor, Expert, Follower, RecklessPusher
from skillsd.envs.sokoban.board import Level, State
from skillsd.envs.sokoban.game import Game, task_of
from skillsd.envs.sokoban.levels import generate, panel_ids, pick, seeds, stable_seed
from skillsd.envs.sokoban.presets import PRESETS, Preset
from skillsd.envs.sokoban.solver import DistanceTable
from skillsd.envs.sokoban.summarise import Mistake, find_mistakes, summarise_moves, without_loops
from skillsd.errors import UserError, unknown_name
from skillsd.types import TRAIN_SPLIT, Demonstration, DemonstrationTurn, Skill

TRIES = 8
"""Careless episodes that are played in search of a mistake, and imperfect ones in search of a success."""


@dataclass(frozen=True)
class Options:
    """What the stream of demonstrations is made of. All shares are in [0, 1].

    Attributes:
        expert_share: of the plain demonstrations, those by the expert; a reckless pusher acts in the others.
        skill_share: of all demonstrations, those with a skill in their prompt.
        mistake_share: of those with a skill, the ones whose skill holds nothing but a mistake.
        warned_share: of those with a plan, the ones that also tell of a mistake.
        noise: chance of a turn that strays from the plan: shown, but not to be learnt.
        detours: the plans come from an expert that makes up to this share of random moves, since the skills
        of RL
            come from students, whose plans are not optimal either.
        per_level: demonstrations on each level.
    """

    expert_share: float = 0.13
    skill_share: float = 0.5
    mistake_share: float = 0.15
    warned_share: float = 0.3
    noise: float = 0.1
    detours: float = 0.25
    per_level: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "per_level":
                if not isinstance(value, int) or value < 1:
                    raise UserError(f"demonstrations: per_level is {value!r}; expected a whole number, at least 1")
            elif not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f"demonstrations: {field.name} is {value!r}; expected a share from 0 to 1")


def demonstrate(preset: str, rules: Preset, seed: int, **options: float) -> Iterator[Demonstration]:
    """The endless stream; the same arguments give the same one. See `Options`.

    Args:
        preset: name of the distribution of levels.
        rules: how episodes are played and worded, if it differs from the preset.

    Raises:
        UserError: for an unknown option or a bad value.
    """
    known = [field.name for field in fields(Options)]
    for name in options:
        if name not in known:
            raise unknown_name("demonstrations option", name, known)
    return _stream(preset, rules, seed, Options(**options))  # type: ignore[arg-type]


def _stream(preset: str, rules: Preset, seed: int, options: Options) -> Iterator[Demonstration]:
    panels = panel_ids()
    for level_seed in seeds("demonstrations", preset, seed):
        entry, table = generate(PRESETS[preset], level_seed)
        if entry.level.id in panels:
            continue
        author = _Author(
            entry.level, entry.moves, table, rules, options, random.Random(stable_seed("actors", level_seed))
        )
        for _ in range(options.per_level):
            yield author.write()


class _Author:
    """Writes the demonstrations on one level."""

    def __init__(
        self,
        level: Level,
        moves: int,
        table: DistanceTable,
        rules: Preset,
        options: Options,
        rng: random.Random,
    ) -> None:
        self._level, self._table, self._rules = level, table, rules
        self._options, self._rng = options, rng
        self._task = task_of(level, TRAIN_SPLIT, moves)
        self._prompt = Game(level, rules).prompt()

    def write(self) -> Demonstration:
        rng, options = self._rng, self._options
        if rng.random() < options.skill_share:
            if rng.random() < options.mistake_share and (failure := self._failure()) is not None:
                return self._warned(*failure)
            return self._guided()
        if rng.random() < options.expert_share:
            return self._perform(Expert(self._table, rng), None)
        return self._perform(RecklessPusher(self._level, rng), None)

    def _warned(self, text: str, mistake: Mistake) -> Demonstration:
        """Careless play that heeds one warning."""
        actor = RecklessPusher(self._level, self._rng, refused=(mistake.player, mistake.move))
        return self._perform(actor, Skill("", text, ""))

    def _guided(self) -> Demonstration:
        """The plan of an imperfect success is followed; off the plan, the expert finds the way."""
        moves = self._success()
        skill = summarise_moves(self._level, moves, self._rules.style)
        assert skill is not None  # a success always has a plan
        path = without_loops(self._states(moves), moves)
        plan = dict(zip(self._states(path), path, strict=False))
        if self._rng.random() < self._options.warned_share and (failure := self._failure()) is not None:
            text, mistake = failure
            # A warning is about a push. Where the plan walks the same way, it would contradict it: leave it
            # out.
            if (mistake.player, mistake.move) not in {(state[0], move) for state, move in plan.items()}:
                both = " ".join(filter(None, (text, skill.mistake_analysis)))
                skill = Skill(skill.success_analysis, both, skill.golden_workflow)
        return self._perform(Follower(plan, Expert(self._table, self._rng)), skill, noise=self._options.noise)

    def _success(self) -> list[int]:
        """The moves of an expert who strays now and then; who does not, if straying fails again and again."""
        for attempt in range(TRIES):
            share = self._rng.random() * self._options.detours if attempt < TRIES - 1 else 0.0
            moves = self._play(Expert(self._table, self._rng), share)
            if self._level.is_solved(self._states(moves)[-1]):
                return moves
        raise AssertionError("an expert solves every level of the preset within max_steps")

    def _failure(self) -> tuple[str, Mistake] | None:
        """What a careless episode teaches, in words, and its decisive mistake; None if none was made."""
        for _ in range(TRIES):
            moves = self._play(RecklessPusher(self._level, self._rng), 0.0)
            mistakes = find_mistakes(self._level, self._states(moves), moves)
            if mistakes:
                skill = summarise_moves(self._level, moves, self._rules.style)
                assert skill is not None
                return skill.mistake_analysis, mistakes[0]
        return None

    def _play(self, actor: Actor, random_share: float) -> list[int]:
        """The moves of an episode that nobody is shown; some are random."""
        state, moves = self._level.start, list[int]()
        while len(moves) < self._rules.max_steps and not self._level.is_solved(state):
            strays = random_share > 0 and self._rng.random() < random_share
            moves.append(int(self._rng.random() * 4) if strays else actor.move(state))
            state = self._level.play(state, moves[-1]) or state
        return moves

    def _perform(self, actor: Actor, skill: Skill | None, noise: float = 0.0) -> Demonstration:
        game = Game(self._level, self._rules)
        turns = []
        while not game.done:
            stray = self._harmless(game.state) if noise > 0 and self._rng.random() < noise else []
            move = pick(self._rng, stray) if stray else actor.move(game.state)
            action = language.say(move, self._rules.style)
            turns.append(DemonstrationTurn(action, game.step(action).observation, learn=not stray))
        return Demonstration(self._task, self._prompt, tuple(turns), skill)

    def _harmless(self, state: State) -> list[int]:
        """The moves after which the level can still be solved: from a lost one there is nothing to be
        learnt.
        """
        level = self._level
        return [move for move in range(4) if (level.play(state, move) or state) in self._table.moves]

    def _states(self, moves: Sequence[int]) -> list[State]:
        """The states before, between and after the moves."""
        states = [self._level.start]
        for move in moves:
            states.append(self._level.play(states[-1], move) or states[-1])
        return states
