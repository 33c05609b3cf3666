"""One episode of Sokoban (synchronous), and the conversion between levels and tasks."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from skillsd.envs.base import Step
from skillsd.envs.sokoban import language
from skillsd.envs.sokoban.board import MOVES, Level
from skillsd.envs.sokoban.presets import Preset
from skillsd.errors import UserError
from skillsd.types import Message, Task

NAME = "sokoban"


class Game:
    """One episode: a level, its state and the number of moves made, under a preset's rules (budget, style)."""

    def __init__(self, level: Level, rules: Preset) -> None:
        self.level = level
        self.rules = rules
        self.state = level.start
        self.steps = 0

    @property
    def done(self) -> bool:
        """Whether the level is solved or no moves are left."""
        return self.steps >= self.rules.max_steps or self.level.is_solved(self.state)

    def prompt(self) -> tuple[Message, ...]:
        """The episode's first prompt."""
        rules = self.rules
        text = language.prompt(self.level, rules.style, rules.max_steps, rules.max_actions_per_turn)
        return (Message("user", text),)

    def step(self, action: str) -> Step:
        """Apply the agent's text. Has no effect after the end of the episode.

        ``info`` has ``moves`` (names of the moves made, including blocked ones), ``board`` (ASCII rows after the
        turn), ``boxes_moved`` (number of pushes), ``invalid`` (the text was not parsed) and ``deadlock`` (see
        `Level.is_dead`).
        """
        level, rules = self.level, self.rules
        parsed = language.parse(action)
        given = parsed or []
        executed: list[int] = []
        blocked: list[int] = []
        pushes = 0
        if parsed is None and not self.done:
            self.steps += 1
        for move in given[: rules.max_actions_per_turn]:
            if self.done:
                break
            self.steps += 1
            executed.append(move)
            after = level.play(self.state, move)
            if after is None:
                blocked.append(move)
            else:
                pushes += after[1] != self.state[1]
                self.state = after
        answer = language.Answer(
            moves=executed,
            blocked=blocked,
            invalid=parsed is None,
            dropped=max(0, len(given) - rules.max_actions_per_turn),
            steps_left=rules.max_steps - self.steps,
        )
        solved = level.is_solved(self.state)
        return Step(
            observation=language.observe(level, self.state, answer, rules.style, rules.max_actions_per_turn),
            done=self.done,
            reward=level.on_target(self.state) / len(level.boxes),
            success=solved,
            info={
                "moves": [MOVES[move] for move in executed],
                "board": level.ascii(self.state),
                "boxes_moved": pushes,
                "invalid": parsed is None,
                "deadlock": not solved and level.is_dead(self.state),
            },
        )


def wording(rules: Preset) -> str:
    """Hash of the texts of two short episodes (16 hex digits), which a change of any text or of the rules changes.

    It is part of the panels' fingerprint, as models answer differently to other words.
    """
    level = Level.from_rows(["######", "# $. #", "#@*# #", "#    #", "######"])
    texts = []
    for actions in (["Up", "Right"], ["dance", "<action>Left, Down, Right, Left, Up, Left</action>"]):  # solved, not
        game = Game(level, rules)
        texts += [message.content for message in game.prompt()]
        while not game.done:
            texts += [game.step(action).observation for action in actions]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def level_of(task: Task) -> Level:
    """The level in a task's payload. Raises UserError if it is missing or invalid."""
    rows = task.payload.get("level")
    if not isinstance(rows, str):
        raise UserError(f"Sokoban task {task.id!r} needs payload['level'], ASCII rows; got {task.payload!r}")
    return _level(rows)


@lru_cache(maxsize=4096)
def _level(rows: str) -> Level:
    # Levels are immutable, and their derived tables (neighbours, dead squares) cost more than an episode's moves:
    # the episodes of a group, and later visits of the task, share one.
    return Level.from_rows(rows.split("\n"))


def task_of(level: Level, split: str, difficulty: int) -> Task:
    """The task for a level. Its difficulty is `difficulty`: for generated levels the moves of the optimal solution."""
    return Task(level.id, NAME, split, {"level": level.ascii()}, float(difficulty))
