"""Demonstrations for the warm start: the engine's own solutions, and careless play, with the engine's real texts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from skillsd.envs.base import Step
from skillsd.envs.demonstration_options import check_share, chosen
from skillsd.envs.hosts import HostBrokenError
from skillsd.envs.textgames import prompt, summarise
from skillsd.errors import UserError
from skillsd.seeds import derive_seed
from skillsd.types import Demonstration, DemonstrationTurn, Message, Skill, Task

MAX_ATTEMPTS = 3
"""Attempts to play an episode, if hosts break."""


CARELESS_EPISODES = 3
"""Maximum number of careless episodes that are played on a task; then they are repeated."""


@dataclass(frozen=True)
class Options:
    """Composition of the demonstrations. Shares are in [0, 1].

    Attributes:
        skill_share: share of demonstrations with a skill in the prompt: the rule-based summariser's skill for the
            solution, which is followed.
        careless_share: of the others, the share of careless play: commands at random, of those that the game lists as
            possible. Only for engines that list them. A model that has seen much of it plays weakly without a skill.
    """

    skill_share: float = 0.5
    careless_share: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_share(field.name, getattr(self, field.name))


class _Environment(Protocol):
    """An environment that lists the commands that are possible."""

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]: ...
    async def step(self, action: str) -> Step: ...
    async def close(self) -> None: ...
    @property
    def valid_commands(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class _Episode:
    """The first prompt, and the actions with their results."""

    prompt: tuple[Message, ...]
    turns: Sequence[tuple[str, Step]]

    @property
    def success(self) -> bool:
        return bool(self.turns) and self.turns[-1][1].success

    @property
    def infos(self) -> list[Mapping[str, Any]]:
        return [step.info for _, step in self.turns]


class Games(Protocol):
    """What a task set needs for demonstrations."""

    style: prompt.Style
    lists_commands: ClassVar[bool]

    @property
    def max_turns(self) -> int: ...
    def make(self) -> Any: ...
    def gold(self, task: Task) -> Sequence[str]: ...
    def demonstration_tasks(self, seed: int) -> Iterator[Task]: ...


def shuffled(tasks: Sequence[Task], seed: int) -> Iterator[Task]:
    """The tasks in random order, again and again."""
    rng = random.Random(derive_seed(seed, "demonstrations"))
    while True:
        yield from rng.sample(tasks, len(tasks))


def demonstrate(games: Games, seed: int, options: Mapping[str, Any]) -> Iterator[Demonstration]:
    """The infinite stream, deterministic given the arguments. See `Options`.

    Raises:
        UserError: for an unknown option or an invalid value.
    """
    taken = chosen(Options, options)
    if taken.careless_share and not games.lists_commands:
        raise UserError("demonstrations: this engine does not list its commands, so careless_share must be 0")
    return _stream(games, seed, taken)


def _stream(games: Games, seed: int, options: Options) -> Iterator[Demonstration]:
    rng = random.Random(derive_seed(seed, "players"))
    solutions: dict[str, _Episode] = {}
    careless: dict[str, list[_Episode]] = {}
    for task in games.demonstration_tasks(seed):
        guided = rng.random() < options.skill_share
        if not guided and rng.random() < options.careless_share:
            played = careless.setdefault(task.id, [])
            if len(played) < CARELESS_EPISODES:
                played.append(_play(games, task, None, rng))
            yield _demonstration(task, rng.choice(played))
            continue
        if task.id not in solutions:
            solutions[task.id] = _solution(games, task, rng)
        solution = solutions[task.id]
        if not solution.success:
            continue  # it takes more turns than there are
        skill = summarise.summarise_turns(solution.infos, True, games.style)
        yield _demonstration(task, solution, skill if guided else None)


def _solution(games: Games, task: Task, rng: random.Random) -> _Episode:
    """The engine's solution, as a skill has it if that wins too."""
    gold = games.gold(task)
    solution = _play(games, task, gold, rng)
    direct = summarise.path(solution.infos, games.style)
    if not solution.success or direct == list(gold):
        return solution
    shorter = _play(games, task, direct, rng)
    return shorter if shorter.success else solution


def _demonstration(task: Task, episode: _Episode, skill: Skill | None = None) -> Demonstration:
    turns = (DemonstrationTurn(action, step.observation) for action, step in episode.turns)
    return Demonstration(task, episode.prompt, tuple(turns), skill)


def _play(games: Games, task: Task, commands: Sequence[str] | None, rng: random.Random) -> _Episode:
    """The episode with these commands; without `commands`, with random ones.

    Raises:
        UserError: if the infrastructure fails in every attempt.
    """
    with ThreadPoolExecutor(1) as thread:  # the caller may be in an event loop
        for attempt in range(MAX_ATTEMPTS):
            try:
                return thread.submit(lambda: asyncio.run(_episode(games, task, commands, rng))).result()
            except HostBrokenError as error:
                if attempt == MAX_ATTEMPTS - 1:
                    raise UserError(f"no demonstration on the task {task.id!r}: {error}") from error
    raise AssertionError("unreachable")


async def _episode(games: Games, task: Task, commands: Sequence[str] | None, rng: random.Random) -> _Episode:
    environment: _Environment = games.make()
    turns: list[tuple[str, Step]] = []
    try:
        opening = await environment.reset(task, 0)
        for number in range(games.max_turns if commands is None else min(len(commands), games.max_turns)):
            command = rng.choice(environment.valid_commands) if commands is None else commands[number]
            action = prompt.written(games.style, command)
            turns.append((action, await environment.step(action)))
            if turns[-1][1].done:
                break
        return _Episode(opening, turns)
    finally:
        await environment.close()
