"""The Sokoban task set and its environment, a thin shell around `skillsd.envs.sokoban.game`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.envs.sokoban import language
from skillsd.envs.sokoban.game import NAME, Game, level_of, task_of
from skillsd.envs.sokoban.presets import PRESETS, STYLES, Preset
from skillsd.envs.sokoban.solver import solve
from skillsd.envs.sokoban.summarise import summariser
from skillsd.errors import UserError, unknown_name
from skillsd.types import TRAIN_SPLIT, Demonstration, Message, Skill, Task, Trajectory


class SokobanEnvironment(Environment):
    """Plays one `Game` at a time."""

    def __init__(self, rules: Preset) -> None:
        self._rules = rules
        self._game: Game | None = None

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Start the task's level. Nothing is random, so the seed makes no difference.

        Raises:
            UserError: if the task's payload holds no legal level.
        """
        self._game = Game(level_of(task), self._rules)
        return self._game.prompt()

    async def step(self, action: str) -> Step:
        if self._game is None:
            raise RuntimeError("step() before reset()")
        return self._game.step(action)

    async def close(self) -> None:
        self._game = None


class Sokoban(TaskSet):
    """Push all boxes onto the targets.

    Args:
        preset: which levels, and the rules of an episode; see `skillsd.envs.sokoban.presets.PRESETS`.
        style: ``terse``, ``objects`` or ``grid``; by default the preset's.
        max_steps: moves in an episode; by default the preset's.
        max_actions_per_turn: moves that one answer may hold; by default the preset's.

    Raises:
        UserError: for an unknown preset or style, or a number below 1.
    """

    name: ClassVar[str] = NAME

    shortcuts: ClassVar[Mapping[str, str]] = {"w": "Up", "a": "Left", "s": "Down", "d": "Right"}
    """Keys for people, see `skillsd.envs.play`."""

    def __init__(
        self,
        preset: str = "nano",
        style: str | None = None,
        max_steps: int | None = None,
        max_actions_per_turn: int | None = None,
    ) -> None:
        if preset not in PRESETS:
            raise unknown_name("Sokoban preset", str(preset), PRESETS)
        if style is not None and style not in STYLES:
            raise unknown_name("Sokoban style", str(style), STYLES)
        changes: dict[str, Any] = {} if style is None else {"style": style}
        for option, value in (("max_steps", max_steps), ("max_actions_per_turn", max_actions_per_turn)):
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"Sokoban option {option} is {value!r}; expected a whole number, at least 1")
            changes[option] = value
        self.preset = preset
        self.rules: Preset = replace(PRESETS[preset], **changes)
        self._tasks: dict[str, tuple[Task, ...]] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.rules.splits)

    @property
    def max_turns(self) -> int:
        return self.rules.max_steps

    def tasks(self, split: str) -> Sequence[Task]:
        """The levels of a split, easy to hard."""
        if split not in self.splits:
            raise unknown_name(f"split of Sokoban {self.preset}", split, self.splits)
        if split not in self._tasks:
            # Imported late, or `python -m skillsd.envs.sokoban.levels` would run a second copy of itself.
            from skillsd.envs.sokoban.levels import panel

            entries = panel(self.preset)[split]
            self._tasks[split] = tuple(task_of(entry.level, split, entry.moves) for entry in entries)
        return self._tasks[split]

    def rules_in_words(self) -> Mapping[str, Any]:
        rules = self.rules
        return {"style": rules.style, "max_actions_per_turn": rules.max_actions_per_turn}

    def for_people(self) -> Sokoban:
        """With the room as a picture."""
        rules = self.rules
        return Sokoban(self.preset, "grid", rules.max_steps, rules.max_actions_per_turn)

    def make(self) -> Environment:
        return SokobanEnvironment(self.rules)

    def summariser(self) -> Callable[[Trajectory], Skill | None]:
        """Rules that word what an episode teaches; they know no better plan than the one that was played."""
        return summariser(self.rules.style)

    def oracle(self, task: Task) -> str | None:
        """An optimal plan, worded like a skill's golden workflow; None if the level can't be solved."""
        level = level_of(task)
        moves = solve(level)
        return None if moves is None else language.plan(level, level.start, moves, self.rules.style)

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        """Episodes on fresh levels that are in no panel: careless play, expert play, and skills followed.

        The options (shares, noise) are those of `skillsd.envs.sokoban.demonstrations.Options`.

        Raises:
            UserError: for any split but ``train``, an unknown option or a bad value.
        """
        from skillsd.envs.sokoban.demonstrations import demonstrate  # late, for the same reason

        if split != TRAIN_SPLIT:
            raise UserError(f"demonstrations are for the split {TRAIN_SPLIT!r} only; got {split!r}")
        return demonstrate(self.preset, self.rules, seed, **options)
