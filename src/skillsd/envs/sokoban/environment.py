"""The Sokoban task set and its environment, a thin wrapper around `skillsd.envs.sokoban.game`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.envs.sokoban import language
from skillsd.envs.sokoban.board import Level
from skillsd.envs.sokoban.game import NAME, Game, level_of, task_of, wording
from skillsd.envs.sokoban.level_files import FileLevel, read_levels
from skillsd.envs.sokoban.presets import PRESETS, STYLES, Preset
from skillsd.envs.sokoban.solver import solve
from skillsd.envs.sokoban.summarise import in_prose, summariser
from skillsd.errors import UserError, unknown_name
from skillsd.types import TRAIN_SPLIT, Demonstration, Message, Skill, Task, Trajectory

TEST_SPLIT = "test"
"""The split of a level file that is given without a split."""

FILE_MAX_STEPS = 500
"""Default of `max_steps` for level files: levels of published collections may need some hundred moves."""

ORACLE_LIMIT = 200_000
"""States that the solver visits for an oracle, some seconds' work. Levels of the presets need a few thousand."""


LEGEND = {
    "#": "wall",
    " ": "floor",
    ".": "target",
    "$": "box",
    "*": "box on target",
    "@": "player",
    "+": "player on target",
}


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
        max_steps: maximum moves in an episode; default: the preset's, or `FILE_MAX_STEPS` with `levels`.
        max_actions_per_turn: maximum moves in one turn; default: the preset's.
        levels: level files (XSB) instead of the preset's levels, as a mapping of splits to files, e.g.
            ``{train: mine.xsb, test: microban.xsb}``. A single file is the split ``test``. The order in a file counts
            as the order of difficulty.

    Raises:
        UserError: for an unknown preset or style, a number below 1, a level file that can't be read or has an invalid
            level, or a level that is in two splits.
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
        levels: str | Path | Mapping[str, str | Path] | None = None,
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
        self._levels = levels
        self._tasks: dict[str, tuple[Task, ...]] = {}
        if levels is not None:
            changes.setdefault("max_steps", FILE_MAX_STEPS)
            self._tasks = _tasks_of_files(levels)
            changes["splits"] = {split: len(tasks) for split, tasks in self._tasks.items()}
        self.rules: Preset = replace(PRESETS[preset], **changes)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.rules.splits)

    @property
    def max_turns(self) -> int:
        return self.rules.max_steps

    def tasks(self, split: str) -> Sequence[Task]:
        """The levels of a split, from easy to hard."""
        if split not in self.splits:
            which = self.preset if self._levels is None else "with these level files (option levels)"
            raise unknown_name(f"split of Sokoban {which}", split, self.splits)
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
        return Sokoban(self.preset, "grid", rules.max_steps, rules.max_actions_per_turn, self._levels)

    def skill_for_people(self, task: Task, skill: Skill) -> Skill:
        """The rules' skills of the terse style in the words of the prose styles."""
        return in_prose(level_of(task), skill) if self.rules.style == "terse" else skill

    def picture(self, trajectory: Trajectory, turn: int | None) -> Mapping[str, Any]:
        """The board."""
        level = level_of(trajectory.task)
        info = {} if turn is None else trajectory.turns[turn].info
        rows = str(info.get("board", level.ascii())).split("\n")
        solved = sum(row.count("*") for row in rows)
        caption = f"{solved} of {len(level.boxes)} boxes on targets" + ", deadlock" * bool(info.get("deadlock"))
        return {"kind": "grid", "rows": rows, "legend": LEGEND, "caption": caption}

    def make(self) -> Environment:
        return SokobanEnvironment(self.rules)

    def summariser(self) -> Callable[[Trajectory], Skill | None]:
        """The rule-based summariser. It doesn't use the solver: plans come from the trajectory alone."""
        return summariser(self.rules.style)

    def oracle(self, task: Task) -> str | None:
        """An optimal plan in the format of a skill's golden workflow.

        None if the level is unsolvable, or too large for the solver (see `ORACLE_LIMIT`).
        """
        level = level_of(task)
        moves = _solution(level)
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
        own = (
            {level_of(task).id for tasks in self._tasks.values() for task in tasks} if self._levels is not None else ()
        )
        return demonstrate(self.preset, self.rules, seed, excluded=own, **options)


def _tasks_of_files(levels: Any) -> dict[str, tuple[Task, ...]]:
    """The tasks of level files by split; see `Sokoban`.

    Raises:
        UserError: as `Sokoban`.
    """
    files = levels if isinstance(levels, Mapping) else {TEST_SPLIT: levels}
    named = all(isinstance(split, str) and isinstance(file, (str, Path)) for split, file in files.items())
    if not files or not named:
        raise UserError(
            f"Sokoban option levels is {levels!r}; expected a level file, or splits with their level files, e.g. "
            "{train: mine.xsb, test: microban.xsb}"
        )
    read = {split: read_levels(Path(file).expanduser()) for split, file in files.items()}
    _check_apart(read)
    return {split: tuple(_tasks_of(found, split)) for split, found in read.items()}


def _check_apart(read: Mapping[str, Sequence[FileLevel]]) -> None:
    owner: dict[str, tuple[str, str]] = {}
    for split, levels in read.items():
        for found in levels:
            other, place = owner.setdefault(found.level.id, (split, found.place))
            if other != split:
                raise UserError(
                    f"{found.place}: this level of the split {split!r} is the same puzzle as {place} of {other!r} (at "
                    "most shifted, turned, mirrored, or with another starting place): remove one of them"
                )


def _tasks_of(levels: Sequence[FileLevel], split: str) -> Iterator[Task]:
    """The tasks of one split. A puzzle that occurs again in it gets a number after its id, since ids are unique."""
    times: dict[str, int] = {}
    for number, found in enumerate(levels, 1):
        task = task_of(found.level, split, number)
        times[task.id] = times.get(task.id, 0) + 1
        yield task if times[task.id] == 1 else replace(task, id=f"{task.id}-{times[task.id]}")


@lru_cache(maxsize=4096)
def _solution(level: Level) -> tuple[int, ...] | None:
    try:
        moves = solve(level, limit=ORACLE_LIMIT)
    except RuntimeError:  # too large
        return None
    return None if moves is None else tuple(moves)
