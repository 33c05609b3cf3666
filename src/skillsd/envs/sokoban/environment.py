"""The Sokoban task set and its environment, a thin wrapper around `skillsd.envs.sokoban.game`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.envs.sokoban import language
from skillsd.envs.sokoban.game import NAME, Game, level_of, task_of, wording
from skillsd.envs.sokoban.presets import PRESETS, STYLES, Preset
from skillsd.envs.sokoban.solver import solve
from skillsd.envs.sokoban.summarise import summariser
from skillsd.errors import UserError, unknown_name
from skillsd.types import TRAIN_SPLIT, Demonstration, Message, Skill, Task, Trajectory


class SokobanEnvironment(Environment):
    """Runs one `Game` at a time."""

    def __init__(self, rules: Preset) -> None:
        self._rules = rules
        self._game: Game | None = None

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Start the task's level. The environment is deterministic: the seed is unused.

        Raises:
            UserError: if the task's payload has no valid level.
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
    """Sokoban: push every box onto a target.

    Args:
        preset: the levels and rules; see `skillsd.envs.sokoban.presets.PRESETS`.
        style: prompt style, ``terse``, ``objects`` or ``grid``; default: the preset's.
        max_steps: maximum moves in an episode; default: the preset's.
        max_actions_per_turn: maximum moves in one turn; default: the preset's.

    Raises:
        UserError: for an unknown preset or style, or a number below 1.
    """

    name: ClassVar[str] = NAME

    shortcuts: ClassVar[Mapping[str, str]] = {"w": "Up", "a": "Left", "s": "Down", "d": "Right"}
    """Keys for human players; see `skillsd.envs.play`."""

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
        """The levels of a split, from easy to hard."""
        if split not in self.splits:
            raise unknown_name(f"split of Sokoban {self.preset}", split, self.splits)
        if split not in self._tasks:
            # Imported here: at the top, `python -m skillsd.envs.sokoban.levels` would import its own module twice.
            from skillsd.envs.sokoban.levels import panel

            entries = panel(self.preset)[split]
            self._tasks[split] = tuple(task_of(entry.level, split, entry.moves) for entry in entries)
        return self._tasks[split]

    def rules_in_words(self) -> Mapping[str, Any]:
        rules = self.rules
        return {
            "style": rules.style,
            "max_actions_per_turn": rules.max_actions_per_turn,
            "wording": wording(rules),
        }

    def for_people(self) -> Sokoban:
        """The same tasks with the room drawn as a grid."""
        rules = self.rules
        return Sokoban(self.preset, "grid", rules.max_steps, rules.max_actions_per_turn)

    def make(self) -> Environment:
        return SokobanEnvironment(self.rules)

    def summariser(self) -> Callable[[Trajectory], Skill | None]:
        """The rule-based summariser. It doesn't use the solver: plans come from the trajectory alone."""
        return summariser(self.rules.style)

    def oracle(self, task: Task) -> str | None:
        """An optimal plan in the format of a skill's golden workflow; None if the level is unsolvable."""
        level = level_of(task)
        moves = solve(level)
        return None if moves is None else language.plan(level, level.start, moves, self.rules.style)

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        """Demonstrations on newly generated levels that are in no panel: careless play, expert play, skill following.

        See `skillsd.envs.sokoban.demonstrations.Options` for the options.

        Raises:
            UserError: for a split other than ``train``, an unknown option or an invalid value.
        """
        from skillsd.envs.sokoban.demonstrations import demonstrate  # imported here for the same reason as `panel`

        if split != TRAIN_SPLIT:
            raise UserError(f"demonstrations are for the split {TRAIN_SPLIT!r} only; got {split!r}")
        return demonstrate(self.preset, self.rules, seed, **options)
