"""ScienceWorld's engine for serve.py."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jvm
from scienceworld.constants import JAR_PATH

CONSTANT_HASHES = ["-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2"]
"""The engine keeps its objects in sets, whose order depends on the objects' hashes, which Java draws at random. With
equal hashes it is the order in which they were added, so that the same episode always has the same texts."""


class Engine:
    """The virtual machine of all games in this process."""

    def __init__(self) -> None:
        self.classes = jvm.start(JAR_PATH, "768m", CONSTANT_HASHES)

    def game(self) -> Game:
        return Game(self.classes)


class Game:
    """One game: the requests, a method each."""

    def __init__(self, classes: Any) -> None:
        self._server = classes.scienceworld.runtime.pythonapi.PythonInterface()
        self._ids = classes.util.UniqueIdentifier
        self._next_id = 0

    def open(self, task: str, variation: int, simplifications: str) -> dict[str, Any]:
        """Start a variation of a task."""
        self._next_id = 0
        self._call("load", task, variation, simplifications, False)
        self._call("reset")
        return {"task": self._server.getTaskDescription(), **self._state(self._call("step", "look around"))}

    def step(self, command: str) -> dict[str, Any]:
        return self._state(self._call("step", command))

    def gold(self, task: str, variation: int, simplifications: str) -> dict[str, Any]:
        """The engine's own solution, which may differ from call to call, up to the command that completes the task."""
        self._next_id = 0
        self._call("load", task, variation, simplifications, True)
        found = list(self._server.getGoldActionSequence())
        self.open(task, variation, simplifications)
        last = next((place for place, command in enumerate(found) if self.step(command)["done"]), len(found))
        return {"commands": found[: last + 1]}

    def survey(self, task: str, variations: Sequence[int]) -> dict[str, Any]:
        """Hashes of the first prompt and of the whole world, for each variation."""
        return {"hashes": [self._hashes(task, variation) for variation in variations]}

    def _hashes(self, task: str, variation: int) -> list[str]:
        opened = self.open(task, variation, "")
        with tempfile.TemporaryDirectory() as folder:
            if problem := self._server.getObjectTree(folder):
                raise RuntimeError(problem)
            tree = json.loads(Path(folder, "objectTree.json").read_text(encoding="utf-8"))
        inventory = self._call("freeActionInventory")
        return [_hash(f"{opened['task']}\n{opened['text']}\n{inventory}"), _hash(json.dumps(_plain(tree)))]

    def folds(self, task: str) -> dict[str, Any]:
        """The variations of a task by fold."""
        self.open(task, 0, "")
        folds = {"train": "Train", "dev": "Dev", "test": "Test"}
        return {fold: list(getattr(self._server, f"getVariations{name}")()) for fold, name in folds.items()}

    def _state(self, text: str) -> dict[str, Any]:
        score = float(self._server.getScore())
        return {
            "text": text,
            "score": score,
            "success": score >= 1,
            "done": bool(self._server.getCompleted()) or score < 0,  # below 0: the wrong thing was chosen
            "place": _hash(self._call("freeActionLook") + self._call("freeActionInventory")),
        }

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call the engine with this game's own counter of ids: the engine has one for all games."""
        getattr(self._ids, "count_$eq")(self._next_id)
        try:
            return getattr(self._server, method)(*arguments)
        finally:
            self._next_id = self._ids.count()


def _plain(tree: Any) -> Any:
    """An object with what is in it, without the ids and the order."""
    if isinstance(tree, dict):
        plain = {key: _plain(value) for key, value in sorted(tree.items()) if key not in ("uuid", "contents")}
        plain["propElectricalConnection"] = bool(tree.get("propElectricalConnection"))  # has ids
        plain["contents"] = sorted(json.dumps(_plain(item)) for item in tree.get("contents", {}).values())
        return plain
    return [_plain(item) for item in tree] if isinstance(tree, list) else tree


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
