"""The ScienceWorld task set: thirty tasks of elementary science, in a house with a workshop and a greenhouse."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from skillsd.cache import cache
from skillsd.envs.base import evenly_spaced
from skillsd.envs.scienceworld.setup import VENV
from skillsd.envs.scienceworld.variations import TASKS, folds
from skillsd.envs.textgames.engine import Engine
from skillsd.envs.textgames.environment import TextGames
from skillsd.errors import unknown_name
from skillsd.files.write import write_whole
from skillsd.types import Task

SIMPLIFICATIONS = (
    "easy",
    "teleportAction",
    "selfWateringFlowerPots",
    "openContainers",
    "openDoors",
    "noElectricalAction",
)

_REFUSALS = re.compile(r"No known action|Ambiguous request|\bis not\b|It's not clear|\bcan't\b|cannot|already|does not")
_MAX_REFUSAL_CHARS = 200


class ScienceWorld(TextGames):
    """ScienceWorld (Wang et al., arXiv 2203.07540) on its own engine.

    Focusing on a wrong object ends an episode, with reward 0.

    Args:
        task_names: names from `TASKS`, or ``all``.
        variations: number of variations of each task and split, evenly spaced; None for all.
        simplifications: of the engine, from `SIMPLIFICATIONS`.
        style, max_turns, max_observation_chars, hosts, call_seconds: see `TextGames`. The engine's authors allow 100
            turns. Some solutions of its own take more; those are no demonstrations.

    Raises:
        UserError: for an invalid value.
    """

    name: ClassVar[str] = "scienceworld"
    engine: ClassVar[Engine] = Engine(VENV, "science", recycle=200)
    lists_commands: ClassVar[bool] = False
    commands: ClassVar[str] = (
        "Commands: open X, close X, activate X, deactivate X, connect X to Y, disconnect X, use X on Y, look around, "
        "look at X, look in X, read X, pick up X, put down X, move X to Y, pour X into Y, dunk X into Y, mix X, "
        "eat X, flush X, go to PLACE, focus on X, wait, wait1, task, inventory. Focus only on what the task asks for. "
        "If the game asks which of several things you mean, answer with the number."
    )

    def __init__(
        self,
        task_names: str | Sequence[str] = "all",
        variations: int | None = None,
        simplifications: Sequence[str] = (),
        style: str = "react",
        max_turns: int = 100,
        max_observation_chars: int = 2000,
        hosts: int | None = None,
        call_seconds: float = 240.0,
    ) -> None:
        super().__init__(style, max_turns, max_observation_chars, hosts, call_seconds)
        self.task_names = tuple(TASKS) if task_names == "all" else _names(task_names)
        self.simplifications = _names(simplifications)
        for name in self.task_names:
            if name not in TASKS:
                raise unknown_name("task of ScienceWorld", str(name), TASKS)
        for name in self.simplifications:
            if name not in SIMPLIFICATIONS:
                raise unknown_name("simplification of ScienceWorld", str(name), SIMPLIFICATIONS)
        self._variations = None if variations is None else self.checked("variations", variations)

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split; those first whose kind has a short solution."""
        if split not in self.splits:
            raise unknown_name(f"split of {self.name!r}", split, self.splits)
        return [
            self._task(name, variation, split)
            for name in sorted(self.task_names, key=lambda name: TASKS[name][1])
            for variation in evenly_spaced(folds(name)[split], self._variations)
        ]

    def _task(self, name: str, variation: int, split: str) -> Task:
        simplified = ",".join(self.simplifications)
        payload = {"task": name, "variation": variation, "simplifications": simplified}
        name_of_all = "-".join([name, str(variation), *self.simplifications])
        return Task(name_of_all, self.name, split, payload, TASKS[name][1])

    def opening(self, task: Task) -> Mapping[str, Any]:
        return task.payload

    def gold(self, task: Task) -> Sequence[str]:
        """The commands of the engine's own solution. The first time, the engine finds it: that takes seconds."""
        path = cache() / "scienceworld-gold" / VENV.folder / f"{task.id}.json"
        found = _read(path)
        if found is None:
            expected = {"commands": list}
            host = self.pool().any()
            found = self.engine.ask(host, "gold", self.call_seconds, expected, **task.payload)["commands"]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(found))
        return found

    def scenario(self, task: Task) -> str:
        """The name of ScienceWorld's task, of which this is a variation."""
        return str(task.payload["task"])

    def refused(self, command: str, text: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        """Whether the game's answer is one of its refusals, and nothing has changed."""
        unchanged = before["place"] == after["place"] and before["score"] == after["score"]
        return unchanged and len(text) <= _MAX_REFUSAL_CHARS and _REFUSALS.search(text) is not None


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _read(path: Path) -> list[str] | None:
    """The commands in a file; None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and all(isinstance(command, str) for command in found) else None
