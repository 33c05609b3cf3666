"""Demonstrations for the warm start: weak and strong play, with and without a skill to follow.

To study skills, a base model needs three things before RL: the environment's language, basic competence (mostly
careless play, some expert play), and the ability to follow a skill in its prompt. Levels are newly generated from the
preset's distribution; none is in a panel.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

from skillsd.envs.demonstration_options import check_count, check_share, chosen
from skillsd.envs.sokoban import language
from skillsd.envs.sokoban.board import Level, State
from skillsd.envs.sokoban.game import Game, task_of
from skillsd.envs.sokoban.levels import generate, panel_ids, pick, seeds, stable_seed
from skillsd.envs.sokoban.policies import Expert, Follower, RecklessPusher, ScriptedPolicy
from skillsd.envs.sokoban.presets import PRESETS, Preset
from skillsd.envs.sokoban.solver import DistanceTable
from skillsd.envs.sokoban.summarise import Mistake, find_mistakes, summarise_moves, without_loops
from skillsd.types import TRAIN_SPLIT, Demonstration, DemonstrationTurn, Skill

MAX_ATTEMPTS = 8
"""Episodes played to find one with a mistake (careless play), or a success (imperfect expert play)."""


@dataclass(frozen=True)
class Options:
    """Composition of the demonstrations. Shares are in [0, 1].

    Attributes:
        expert_share: share of expert play among demonstrations without a skill; the rest is careless play.
        skill_share: share of all demonstrations that have a skill in the prompt.
        mistake_share: of these, the share whose skill only warns of a mistake.
        warned_share: of those with a plan, the share that also warns of a mistake.
        noise: probability that a turn deviates from the plan. Such turns are in the context but not in the loss.
        detours: plans come from an expert with up to this share of random moves, because the skills in RL come from
            students, whose plans are not optimal either.
        per_level: demonstrations per level.
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
            check_count(field.name, value) if field.name == "per_level" else check_share(field.name, value)


def demonstrate(
    preset: str, rules: Preset, seed: int, *, excluded: Collection[str] = (), **options: float
) -> Iterator[Demonstration]:
    """The infinite stream of demonstrations, deterministic given the arguments. See `Options`.

    Args:
        preset: name of the level distribution.
        rules: the episodes' rules and prompt style; may differ from the preset's.
        excluded: ids of levels to leave out, besides those of the panels of all presets.

    Raises:
        UserError: for an unknown option or an invalid value.
    """
    return _stream(preset, rules, seed, panel_ids().union(excluded), chosen(Options, options))


def _stream(
    preset: str, rules: Preset, seed: int, excluded: Collection[str], options: Options
) -> Iterator[Demonstration]:
    for level_seed in seeds("demonstrations", preset, seed):
        entry, table = generate(PRESETS[preset], level_seed)
        if entry.level.id in excluded:
            continue
        rng = random.Random(stable_seed("actors", level_seed))  # part of the seed: renaming it changes the stream
        author = _Author(entry.level, entry.moves, table, rules, options, rng)
        for _ in range(options.per_level):
            yield author.write()


class _Author:
    """Generates the demonstrations on one level."""

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
        """Careless play that avoids the mistake its skill warns about."""
        policy = RecklessPusher(self._level, self._rng, avoid=(mistake.player, mistake.move))
        return self._perform(policy, Skill("", text, ""))

    def _guided(self) -> Demonstration:
        """Play that follows the plan of an imperfect success; in states off the plan, expert play."""
        moves = self._success()
        skill = summarise_moves(self._level, moves, self._rules.style)
        assert skill is not None  # a success always has a plan
        path = without_loops(self._states(moves), moves)
        plan = dict(zip(self._states(path), path, strict=False))
        if self._rng.random() < self._options.warned_share and (failure := self._failure()) is not None:
            text, mistake = failure
            # The warning concerns a push. If the plan makes the same move there as a step, the two would conflict.
            if (mistake.player, mistake.move) not in {(state[0], move) for state, move in plan.items()}:
                both = " ".join(filter(None, (text, skill.mistake_analysis)))
                skill = Skill(skill.success_analysis, both, skill.golden_workflow)
        return self._perform(Follower(plan, Expert(self._table, self._rng)), skill, noise=self._options.noise)

    def _success(self) -> list[int]:
        """The moves of an expert with some random moves mixed in; the last attempt has none."""
        for attempt in range(MAX_ATTEMPTS):
            share = self._rng.random() * self._options.detours if attempt < MAX_ATTEMPTS - 1 else 0.0
            moves = self._play(Expert(self._table, self._rng), share)
            if self._level.is_solved(self._states(moves)[-1]):
                return moves
        raise AssertionError("the expert must solve every level of the preset within max_steps")

    def _failure(self) -> tuple[str, Mistake] | None:
        """The mistake analysis of a careless episode and its decisive mistake; None if no attempt has a mistake."""
        for _ in range(MAX_ATTEMPTS):
            moves = self._play(RecklessPusher(self._level, self._rng), 0.0)
            mistakes = find_mistakes(self._level, self._states(moves), moves)
            if mistakes:
                skill = summarise_moves(self._level, moves, self._rules.style)
                assert skill is not None
                return skill.mistake_analysis, mistakes[0]
        return None

    def _play(self, policy: ScriptedPolicy, random_share: float) -> list[int]:
        """The moves of an auxiliary episode, with a share of random moves. It is not part of the demonstrations."""
        state, moves = self._level.start, list[int]()
        while len(moves) < self._rules.max_steps and not self._level.is_solved(state):
            at_random = random_share > 0 and self._rng.random() < random_share
            moves.append(int(self._rng.random() * 4) if at_random else policy.move(state))
            state = self._level.play(state, moves[-1]) or state
        return moves

    def _perform(self, policy: ScriptedPolicy, skill: Skill | None, noise: float = 0.0) -> Demonstration:
        game = Game(self._level, self._rules)
        turns = []
        while not game.done:
            noisy = self._solvable_moves(game.state) if noise > 0 and self._rng.random() < noise else []
            move = pick(self._rng, noisy) if noisy else policy.move(game.state)
            action = language.action_text(move, self._rules.style)
            turns.append(DemonstrationTurn(action, game.step(action).observation, learn=not noisy))
        return Demonstration(self._task, self._prompt, tuple(turns), skill)

    def _solvable_moves(self, state: State) -> list[int]:
        """The moves that leave the level solvable. Noise must not end in a deadlock: nothing useful follows one."""
        level = self._level
        return [move for move in range(4) if (level.play(state, move) or state) in self._table.moves]

    def _states(self, moves: Sequence[int]) -> list[State]:
        """The states before, between and after the moves."""
        states = [self._level.start]
        for move in moves:
            states.append(self._level.play(states[-1], move) or states[-1])
        return states
