"""The TextWorld-Express task set: eight text games, each with as many different tasks as are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from skillsd.envs.textgames.demonstrations import shuffled
from skillsd.envs.textgames.engine import Engine
from skillsd.envs.textgames.environment import TextGames
from skillsd.envs.textworld_express import listing
from skillsd.envs.textworld_express.venv import VENV
from skillsd.errors import unknown_name
from skillsd.types import TRAIN_SPLIT, Task

GAMES = ("cookingworld", "twc", "coin", "mapreader", "arithmetic", "sorting", "simonsays", "peckingorder")

DEMONSTRATED = 200
"""Number of games for demonstrations: the last ones of the training fold."""

_READING = ("look around", "inventory", "examine ", "read ", "task")


class TextWorldExpress(TextGames):
    """TextWorld-Express (Jansen and Côté, arXiv 2208.01174) on its own engine.

    Args:
        games: names from `GAMES`, or ``all``.
        params: the engine's parameters by game, e.g. ``{coin: "numLocations=5,includeDoors=0"}``; default: its own.
        train, dev, test: number of tasks per game and split, at most 1,000; fewer if there are fewer different ones.
        style, max_turns, max_observation_chars, hosts, call_seconds: see `TextGames`. Games that take more than
            `max_turns` commands are left out.

    Raises:
        UserError: for an invalid value.
    """

    name: ClassVar[str] = "textworld-express"
    engine: ClassVar[Engine] = Engine(VENV, "express")
    commands: ClassVar[str] = (
        "Commands: look around, inventory, task, move north (east, south, west), open door to north, open X, close X, "
        "take X, put X in Y, read X, examine X, eat X, chop X, slice X, dice X, cook X in Y, prepare meal, eat meal."
    )

    def __init__(
        self,
        games: str | Sequence[str] = "all",
        params: Mapping[str, str] | None = None,
        train: int = 50,
        dev: int = 20,
        test: int = 50,
        style: str = "react",
        max_turns: int = 50,
        max_observation_chars: int = 2000,
        hosts: int | None = None,
        call_seconds: float = 45.0,
    ) -> None:
        super().__init__(style, max_turns, max_observation_chars, hosts, call_seconds)
        self.games = GAMES if games == "all" else tuple([games] if isinstance(games, str) else games)
        self.params = dict(params or {})
        for game in (*self.games, *self.params):
            if game not in GAMES:
                raise unknown_name("game of TextWorld-Express", str(game), GAMES)
        given = {"train": train, "dev": dev, "test": test}
        self._counts = {split: self.checked(split, count) for split, count in given.items()}
        self._listed: dict[str, dict[str, list[listing.Game]]] = {}
        self._fresh_gold: dict[tuple[str, int], tuple[str, ...]] = {}

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split, those with a short gold path first. The first call lists the games (seconds).

        Raises:
            UserError: for an unknown split, or if the engine is not installed.
        """
        if split not in self.splits:
            raise unknown_name(f"split of {self.name!r}", split, self.splits)
        tasks = [self._task(game, split, entry) for game in self.games for entry in self._entries(game)[split]]
        return sorted(tasks, key=lambda task: task.difficulty)

    def _task(self, game: str, split: str, entry: listing.Game) -> Task:
        payload = {"game": game, "params": self.params.get(game, ""), "fold": split, "seed": entry.seed}
        return Task(f"{game}-{entry.texts}", self.name, split, payload, len(entry.gold))

    def _entries(self, game: str) -> dict[str, list[listing.Game]]:
        if game not in self._listed:
            params = self.params.get(game, "")
            self._listed[game] = listing.listed(self._ask, VENV.title, game, params, self._counts, self.max_turns)
        return self._listed[game]

    def _ask(self, op: str, seconds: float, expected: Any, /, **arguments: Any) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self.engine.ask(self.pool().any(), op, seconds, expected, **arguments)
        return answer

    def opening(self, task: Task) -> Mapping[str, Any]:
        return task.payload

    def gold(self, task: Task) -> Sequence[str]:
        game, seed = task.payload["game"], task.payload["seed"]
        entries = self._entries(game)[task.split]
        listed = {entry.seed: entry.gold for entry in entries}
        return listed[seed] if seed in listed else self._fresh_gold[game, seed]

    def scenario(self, task: Task) -> str:
        """The game's name."""
        return str(task.payload["game"])

    def refused(self, command: str, text: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        """Whether a command that should change something changed nothing."""
        unchanged = before["place"] == after["place"] and before["score"] == after["score"]
        return text.startswith("Unknown action") or (unchanged and not command.startswith(_READING))

    def demonstration_tasks(self, seed: int) -> Iterator[Task]:
        """Games of the training fold that are in no split, from its end; again and again."""
        fresh = [task for game in self.games for task in self._fresh(game)]
        return shuffled(fresh, seed)

    def _fresh(self, game: str) -> Iterator[Task]:
        listed = {entry.texts for entries in self._entries(game).values() for entry in entries}
        params = self.params.get(game, "")
        seeds = self._ask("seeds", listing.REQUEST_SECONDS, {"seeds": list}, fold=TRAIN_SPLIT)["seeds"]
        for start in range(len(seeds) - DEMONSTRATED, len(seeds), listing.CHUNK):
            chunk = seeds[start : start + listing.CHUNK]
            for entry in listing.survey(self._ask, game, params, TRAIN_SPLIT, chunk):
                if entry.texts not in listed and len(entry.gold) <= self.max_turns:
                    self._fresh_gold[game, entry.seed] = entry.gold
                    yield self._task(game, TRAIN_SPLIT, entry)
