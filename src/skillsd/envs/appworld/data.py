"""What an AppWorld root folder holds: splits, tasks and, where it is there, their ground truth.

It reads AppWorld's own format (``ROOT/data``) without the engine, so the official data and the worlds that we build
look the same from here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from skillsd.envs.appworld.paths import SETUP
from skillsd.errors import UserError, unknown_name
from skillsd.types import TRAIN_SPLIT, Task

NAME = "appworld"
"""The environment's name, as it stands in `Task.env`."""

DB_VERSION = "0.1.0"
"""The version of the tasks that the pinned engine opens; it refuses all others."""

APPS = (
    *("amazon", "api_docs", "file_system", "gmail", "phone", "simple_note", "splitwise", "spotify", "supervisor"),
    *("todoist", "venmo"),
)
"""The engine's apps, in the order in which the agent is told of them."""

SPLITS = (TRAIN_SPLIT, "dev", "test", "dev_scenario", "test_scenario", "test_normal", "test_challenge")
"""The order in which splits are listed. Those of other names come after them."""

_SETUP = f"Run `{SETUP}`, or point to a folder that holds AppWorld's `data`."
_CHECKS = ("evaluation.py", "test_data.json", "answer.json", "public_data.json", "private_data.json", "metadata.json")
_NEEDED = ("evaluation.py", "test_data.json", "answer.json")
_CANARY = re.compile(r"^# Canary String:.*\n?", re.MULTILINE)


@dataclass(frozen=True)
class SolutionTurn:
    """One turn of a reference solution: what is thought, and the code that is run."""

    thought: str
    code: str


class World:
    """The tasks in an AppWorld root folder. Nothing is written, and no task is opened.

    Args:
        root: the folder that holds ``data``, i.e. ``APPWORLD_ROOT``.

    Raises:
        UserError: if it is no such folder, a split names a task that is not there or names one twice, or a task of
            ``train`` is in another split as well.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self._data = self.root / "data"
        for part in ("datasets", "tasks"):
            if not (self._data / part).is_dir():
                raise UserError(
                    f"{str(self.root)!r} is no AppWorld root: expected a folder data/{part} in it. {_SETUP}"
                )
        read = {split: self._read_split(split) for split in self._find_splits()}
        self._ids = {split: ids for split, ids in read.items() if ids}
        if TRAIN_SPLIT not in self._ids:
            raise UserError(f"expected the ids of the tasks to train on in {self._dataset(TRAIN_SPLIT)}. {_SETUP}")
        self._tasks: dict[str, tuple[Task, ...]] = {}
        train = set(self._ids[TRAIN_SPLIT])
        for split, ids in self._ids.items():
            shared = sorted(train.intersection(ids)) if split != TRAIN_SPLIT else []
            if shared:
                raise UserError(
                    f"{len(shared)} tasks are in the split {split!r} and in {TRAIN_SPLIT!r} ({', '.join(shared[:3])}): "
                    f"what is evaluated must not be trained on. Remove {self._dataset(split)}, or the ids from it."
                )

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, ``train`` first. An empty dataset is none."""
        return tuple(self._ids)

    def tasks(self, split: str) -> tuple[Task, ...]:
        """The tasks of a split, easy to hard; those of unknown difficulty count as easiest.

        Raises:
            UserError: for an unknown split, or a task that cannot be read or was made for another engine.
        """
        if split not in self._ids:
            raise unknown_name(f"split of the AppWorld data in {str(self.root)!r}", split, self._ids)
        if split not in self._tasks:
            tasks = [self._read_task(task_id, split) for task_id in self._ids[split]]
            self._tasks[split] = tuple(sorted(tasks, key=lambda task: (task.difficulty, *_natural(task.id))))
        return self._tasks[split]

    def has_ground_truth(self, task_id: str) -> bool:
        """Whether an episode of the task can be evaluated here. The official test splits come without."""
        return all(os.access(self._truth(task_id) / name, os.R_OK) for name in _NEEDED)

    def answer(self, task_id: str) -> Any:
        """The answer that the task asks for; None if it asks for none, or there is no ground truth."""
        return self._read_json(self._truth(task_id) / "answer.json")

    def solution(self, task_id: str) -> tuple[SolutionTurn, ...] | None:
        """The reference solution: our ``solution.json``, or AppWorld's solution program as one turn; else None.

        Raises:
            UserError: for a ``solution.json`` that is not a list of ``thought`` and ``code``.
        """
        path = self._truth(task_id) / "solution.json"
        turns = self._read_json(path)
        if turns is not None:
            try:
                return tuple(SolutionTurn(str(turn["thought"]), str(turn["code"])) for turn in turns)
            except (TypeError, KeyError) as error:
                raise UserError(f"{path} is not a list of turns with 'thought' and 'code': {error!r}") from error
        for name in ("compiled_solution.py", "solution.py"):
            try:
                code = (self._truth(task_id) / name).read_text(encoding="utf-8")
            except OSError:
                continue
            code = _CANARY.sub("", code).strip()
            # The program defines a function, which AppWorld calls with what every task's shell has at hand.
            if re.search(r"^def solution\(", code, re.MULTILINE):
                code += "\n\nsolution(apis, requester)"
            return (SolutionTurn("I know how to do the whole task in one program.", code),)
        return None

    @cached_property
    def fingerprint_source(self) -> Mapping[str, Any]:
        """What makes results on two worlds comparable or not, beside the tasks' texts; JSON-able.

        The base databases are told apart by their files' names and sizes: the official ones are too large to be read.
        Solutions are left out, since they change no result.
        """
        digest = hashlib.sha256()
        for task_id in sorted({task_id for ids in self._ids.values() for task_id in ids}):
            for path in (self._specs(task_id), *(self._truth(task_id) / name for name in _CHECKS)):
                content = path.read_bytes() if os.access(path, os.R_OK) else b""
                digest.update(f"{task_id}/{path.name}:{len(content)}\n".encode() + content)
        files = sorted(path for path in (self._data / "base_dbs").rglob("*") if path.is_file())
        return {
            "version": self._version(),
            "base_dbs": {path.relative_to(self._data).as_posix(): path.stat().st_size for path in files},
            "tasks": digest.hexdigest(),
        }

    def _find_splits(self) -> list[str]:
        found = {path.stem for path in (self._data / "datasets").glob("*.txt")}
        return [*(name for name in SPLITS if name in found), *sorted(found.difference(SPLITS))]

    def _read_split(self, split: str) -> tuple[str, ...]:
        path = self._dataset(split)
        # AppWorld lets a line carry a tag, `<id>:<tag>`, that means nothing to whoever plays.
        lines = [line.split(":")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        ids = [line for line in lines if line]
        for task_id in ids:
            if not re.fullmatch(r"\w+_\d+", task_id):
                raise UserError(f"{path} names {task_id!r}, which is no AppWorld id; expected <scenario>_<number>")
            if not self._specs(task_id).is_file():
                raise UserError(f"{path} names the task {task_id!r}, but there is no {self._specs(task_id)}. {_SETUP}")
        if len(set(ids)) < len(ids):
            twice = next(task_id for place, task_id in enumerate(ids) if task_id in ids[:place])
            raise UserError(f"{path} names the task {twice!r} twice")
        return tuple(ids)

    def _read_task(self, task_id: str, split: str) -> Task:
        path = self._specs(task_id)
        specs = self._read_json(path)
        if not isinstance(specs, dict):
            raise UserError(f"cannot read the task {path}: expected a JSON object. {_SETUP}")
        if specs.get("db_version") != DB_VERSION:
            raise UserError(
                f"the task {task_id!r} in {str(self.root)!r} is of version {specs.get('db_version')}; the engine opens "
                f"{DB_VERSION} only. {_SETUP}"
            )
        metadata = self._read_json(self._truth(task_id) / "metadata.json")
        difficulty = metadata.get("difficulty") if isinstance(metadata, dict) else None
        try:
            supervisor = specs["supervisor"] if "supervisor" in specs else specs["main_user"]
            payload = {
                "task_id": task_id,
                "instruction": str(specs["instruction"]),
                "supervisor": {name: supervisor[name] for name in ("first_name", "last_name", "email", "phone_number")},
                "datetime": str(specs["datetime"]),
                "difficulty": difficulty,
            }
        except (KeyError, TypeError) as error:
            raise UserError(f"the task {path} is not as AppWorld writes it: {error!r} is missing. {_SETUP}") from error
        return Task(task_id, NAME, split, payload, float(difficulty or 0))

    def _version(self) -> str:
        path = self._data / "version.txt"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    def _dataset(self, split: str) -> Path:
        return self._data / "datasets" / f"{split}.txt"

    def _specs(self, task_id: str) -> Path:
        return self._data / "tasks" / task_id / "specs.json"

    def _truth(self, task_id: str) -> Path:
        return self._data / "tasks" / task_id / "ground_truth"

    @staticmethod
    def _read_json(path: Path) -> Any:
        """The content of a JSON file; None if it is not there or may not be read (the executor's user may not)."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            return None
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}. {_SETUP}") from error


def scenario_of(task_id: str) -> str:
    """The scenario that a task is an instance of: its id without the number at the end."""
    return task_id.rpartition("_")[0]


def _natural(task_id: str) -> tuple[str, int]:
    """Sorts the tenth instance of a scenario after the second."""
    scenario, _, number = task_id.rpartition("_")
    return scenario, int(number)
