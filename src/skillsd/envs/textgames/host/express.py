"""TextWorld-Express's engine for serve.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jvm
from textworld_express.constants import JAR_PATH


class Engine:
    """The virtual machine of all games in this process."""

    def __init__(self) -> None:
        self._classes = jvm.start(JAR_PATH, "256m", ["-XX:TieredStopAtLevel=1"])

    def game(self) -> Game:
        return Game(self._classes.textworldexpress.runtime.PythonInterface())


class Game:
    """One game: the requests, a method each."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def open(self, game: str, params: str, fold: str, seed: int) -> dict[str, Any]:
        """Generate a game and start it."""
        self._load(game, params)
        return {"task": self._server.getTaskDescription(), **self._state(self._new(fold, seed, gold=False))}

    def step(self, command: str) -> dict[str, Any]:
        return self._state(json.loads(self._server.stepJSON(command)))

    def survey(self, game: str, params: str, fold: str, seeds: Sequence[int]) -> dict[str, Any]:
        """What the games of these seeds are like, without those whose gold path does not win.

        Returns:
            ``games``: of each, the seed, a hash of the first prompt, a hash of the texts of its gold path, and the gold
            path up to the winning command.
        """
        self._load(game, params)
        return {"games": list(self._surveyed(fold, seeds))}

    def seeds(self, fold: str) -> dict[str, Any]:
        """The seeds of a fold."""
        of_fold = {"train": "Train", "dev": "Dev", "test": "Test"}[fold]
        return {"seeds": list(getattr(self._server, f"getSeeds{of_fold}")())}

    def _surveyed(self, fold: str, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
        for seed in seeds:
            texts = [self._new(fold, seed, gold=True)["observation"], self._server.getTaskDescription()]
            prompt, commands = _hash(texts), []
            for command in self._server.getGoldActionSequence():
                answer = json.loads(self._server.stepJSON(command))
                commands.append(command)
                texts += [command, answer["observation"]]
                if answer["tasksuccess"]:
                    yield {"seed": seed, "prompt": prompt, "texts": _hash(texts), "gold": commands}
                    break

    def _load(self, game: str, params: str) -> None:
        if problem := self._server.load(game, params):
            raise ValueError(problem)

    def _new(self, fold: str, seed: int, *, gold: bool) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._server.generateNewGameJSON(seed, fold, gold))
        return answer

    def _state(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {
            "text": answer["observation"],
            "score": float(answer["score"]),
            "success": answer["tasksuccess"],
            "done": answer["tasksuccess"] or answer["taskfailure"],
            "commands": sorted(answer["validActions"]),
            "place": _hash([answer["look"], answer["inventory"]]),
        }


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
