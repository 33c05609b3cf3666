"""Reads an AppWorld root folder: splits, tasks and, if present, their ground truth.

It parses AppWorld's own format (``ROOT/data``) without the engine, so the official data and our own task world are read
in the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from skillsd.envs.appworld.paths import SETUP
from skillsd.errors import UserError, unknown_name
from skillsd.types import TRAIN_SPLIT, Task

NAME = "appworld"
"""The environment's name, as in `Task.env`."""

DB_VERSION = "0.1.0"
"""The task data version that the pinned engine accepts; it rejects all others."""

APPS = (
    *("amazon", "api_docs", "file_system", "gmail", "phone", "simple_note", "splitwise", "spotify", "supervisor"),
    *("todoist", "venmo"),
)
"""The engine's apps, in the order of the prompt."""

SPLITS = (TRAIN_SPLIT, "dev", "test", "dev_scenario", "test_scenario", "test_normal", "test_challenge")
"""The order in which splits are listed. Splits with other names follow."""

_SETUP = f"Run `{SETUP}`, or give a folder that contains AppWorld's `data`."
_CHECKS = ("evaluation.py", "test_data.json", "answer.json", "public_data.json", "private_data.json", "metadata.json")
_NEEDED = ("evaluation.py", "test_data.json", "answer.json")
_CANARY = re.compile(r"^# Canary String:.*\n?", re.MULTILINE)


@dataclass(frozen=True)
class SolutionTurn:
    """One turn of a reference solution: a thought and the code to run."""

    thought: str
    code: str


class World:
    """The tasks in an AppWorld root folder. Read-only; doesn't open any task.

    Args:
        root: the folder that contains ``data``, i.e. ``APPWORLD_ROOT``.

    Raises:
        UserError: if the folder isn't an AppWorld root, a split lists a missing or duplicate task, or a task of
            ``train`` is also in another split.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self._data = self.root / "data"
        for part in ("datasets", "tasks"):
            if not (self._data / part).is_dir():
                raise UserError(
                    f"{str(self.root)!r} is not an AppWorld root: expected a folder data/{part} in it. {_SETUP}"
                )
        read = {split: self._read_split(split) for split in self._find_splits()}
        self._ids = {split: ids for split, ids in read.items() if ids}
        if TRAIN_SPLIT not in self._ids:
            raise UserError(f"expected the ids of the training tasks in {self._dataset(TRAIN_SPLIT)}. {_SETUP}")
        self._tasks: dict[str, tuple[Task, ...]] = {}
        train = set(self._ids[TRAIN_SPLIT])
        for split, ids in self._ids.items():
            shared = sorted(train.intersection(ids)) if split != TRAIN_SPLIT else []
            if shared:
                raise UserError(
                    f"{len(shared)} tasks are in the split {split!r} and in {TRAIN_SPLIT!r} ({', '.join(shared[:3])}): "
                    f"evaluation tasks must not be in the training split. Remove {self._dataset(split)}, or the ids "
                    "from it."
                )

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the non-empty splits, ``train`` first."""
        return tuple(self._ids)

    def tasks(self, split: str) -> tuple[Task, ...]:
        """The tasks of a split, from easy to hard; tasks of unknown difficulty come first.

        Raises:
            UserError: for an unknown split, or a task that can't be read or is for another version of the engine.
        """
        if split not in self._ids:
            raise unknown_name(f"split of the AppWorld data in {str(self.root)!r}", split, self._ids)
        if split not in self._tasks:
            tasks = [self._read_task(task_id, split) for task_id in self._ids[split]]
            self._tasks[split] = tuple(sorted(tasks, key=lambda task: (task.difficulty, *_natural(task.id))))
        return self._tasks[split]

    def has_ground_truth(self, task_id: str) -> bool:
        """Whether the task can be graded with these data. The official test splits have no ground truth."""
        return all(os.access(self._truth(task_id) / name, os.R_OK) for name in _NEEDED)

    def answer(self, task_id: str) -> Any:
        """The task's expected answer; None if it asks for none or there is no ground truth."""
        return self._read_json(self._truth(task_id) / "answer.json")

    def solution(self, task_id: str) -> tuple[SolutionTurn, ...] | None:
        """The reference solution, or None: from our ``solution.json``, or AppWorld's solution program as one turn.

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
            # The program defines a function, which AppWorld calls with two objects of the task's shell.
            if re.search(r"^def solution\(", code, re.MULTILINE):
                code += "\n\nsolution(apis, requester)"
            return (SolutionTurn("I know how to do the whole task in one program.", code),)
        return None

    @cached_property
    def fingerprint_source(self) -> Mapping[str, Any]:
        """What identifies the world for comparing results, besides the tasks' texts; JSON-serialisable.

        The content of the base databases, and of each task its databases and checks. Solutions are excluded, because
        they don't affect results.
        """
        digest = hashlib.sha256()
        for task_id in sorted({task_id for ids in self._ids.values() for task_id in ids}):
            databases = sorted((self._specs(task_id).parent / "dbs").glob("*"))
            for path in (self._specs(task_id), *databases, *(self._truth(task_id) / name for name in _CHECKS)):
                content = path.read_bytes() if os.access(path, os.R_OK) else b""
                digest.update(f"{task_id}/{path.name}:{len(content)}\n".encode() + content)
        files = sorted(path for path in (self._data / "base_dbs").rglob("*") if path.is_file())
        ours = (self._data / "skillsd.json").is_file()
        return {
            "version": self._version(),
            "base_dbs": {path.relative_to(self._data).as_posix(): _content_hash(path, dump=ours) for path in files},
            "tasks": digest.hexdigest(),
        }

    def _find_splits(self) -> list[str]:
        found = {path.stem for path in (self._data / "datasets").glob("*.txt")}
        return [*(name for name in SPLITS if name in found), *sorted(found.difference(SPLITS))]

    def _read_split(self, split: str) -> tuple[str, ...]:
        path = self._dataset(split)
        # A line may have a tag, `<id>:<tag>`, which has no meaning for playing the task.
        lines = [line.split(":")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        ids = [line for line in lines if line]
        for task_id in ids:
            if not re.fullmatch(r"\w+_\d+", task_id):
                raise UserError(f"{path} names {task_id!r}, which is not an AppWorld id; expected <scenario>_<number>")
            if not self._specs(task_id).is_file():
                raise UserError(f"{path} names the task {task_id!r}, but {self._specs(task_id)} is missing. {_SETUP}")
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
                f"the task {task_id!r} in {str(self.root)!r} is of version {specs.get('db_version')}; expected "
                f"{DB_VERSION}, the version of the engine. {_SETUP}"
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
            raise UserError(f"the task {path} is not in AppWorld's format: {error!r} is missing. {_SETUP}") from error
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
        """The content of a JSON file; None if it is missing or not readable (ground truth may be restricted)."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            return None
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}. {_SETUP}") from error


def _content_hash(path: Path, *, dump: bool) -> str:
    """Hash of a database (16 hex digits).

    Args:
        dump: hash its rows as SQL, which takes a tenth of a second for 2 MB. The bytes of a database that was built
            here depend on the version of SQLite.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        if dump and path.suffix == ".db":
            database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            stack.callback(database.close)
            for statement in database.iterdump():
                digest.update(statement.encode() + b"\n")
        else:
            file = stack.enter_context(open(path, "rb"))
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def scenario_of(task_id: str) -> str:
    """The scenario of a task: its id without the number at the end."""
    return task_id.rpartition("_")[0]


def _natural(task_id: str) -> tuple[str, int]:
    """Sort key: numbers in numeric order, so that the tenth instance comes after the second."""
    scenario, _, number = task_id.rpartition("_")
    return scenario, int(number)
