"""Which games the splits have. Listed by the engine once, and kept in the cache folder.

The engine's folds have 1,000 seeds each, with other objects and rooms in each fold. Different seeds can give the same
game: a game counts as the same if the texts of its gold path are the same, word for word. Such a game is listed once,
in the first split that has it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from skillsd.cache import cache
from skillsd.errors import UserError
from skillsd.files.write import write_whole

CHUNK = 50
"""Most seeds per request to the engine: a second's work."""
REQUEST_SECONDS = 120.0

Ask = Callable[..., Mapping[str, Any]]
"""``ask(op, seconds, expected, **arguments)``: a request to the engine."""


@dataclass(frozen=True)
class Game:
    """One game of a split.

    Attributes:
        seed: the engine's seed.
        prompt: hash of the first prompt.
        texts: hash of all texts of the gold path.
        gold: the commands of the gold path, up to the one that wins.
    """

    seed: int
    prompt: str
    texts: str
    gold: tuple[str, ...]


def listed(
    ask: Ask, version: str, game: str, params: str, counts: Mapping[str, int], max_turns: int
) -> dict[str, list[Game]]:
    """The games by split, in the order of their seeds.

    Args:
        version: of the engine, for the cache.
        params: the engine's parameters, e.g. ``numLocations=5,includeDoors=0``.
        counts: number of games by split, in the order in which splits get a game that occurs twice. Fewer if the
            engine has no more different ones.
        max_turns: games with a longer gold path are left out.

    Raises:
        UserError: if the engine does not know the game or the parameters, or fails.
    """
    key = json.dumps([version, game, params, dict(counts), max_turns])
    path = cache() / "textworld-express-games" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if (found := _read(path)) is not None:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if (found := _read(path)) is not None:
            return found
        made: dict[str, list[Game]] = {}
        seen: set[str] = set()
        for split, count in counts.items():
            made[split] = _of_split(ask, game, params, split, count, max_turns, seen)
        rows = {split: [asdict(entry) for entry in games] for split, games in made.items()}
        write_whole(path, json.dumps(rows))
    return made


def survey(ask: Ask, game: str, params: str, fold: str, seeds: Sequence[int]) -> list[Game]:
    """The games of these seeds, without those whose gold path does not win."""
    answer = ask("survey", REQUEST_SECONDS, {"games": list}, game=game, params=params, fold=fold, seeds=list(seeds))
    return [_game(row) for row in answer["games"]]


def _of_split(ask: Ask, game: str, params: str, split: str, count: int, max_turns: int, seen: set[str]) -> list[Game]:
    seeds = ask("seeds", REQUEST_SECONDS, {"seeds": list}, fold=split)["seeds"]
    games: list[Game] = []
    while seeds and (missing := count - len(games)) > 0:
        size = min(CHUNK, missing + missing // 4 + 1)  # some are left out
        chunk, seeds = seeds[:size], seeds[size:]
        for entry in survey(ask, game, params, split, chunk):
            if len(games) < count and entry.texts not in seen and len(entry.gold) <= max_turns:
                seen.add(entry.texts)
                games.append(entry)
    if not games:
        raise UserError(f"the game {game!r} with {params!r} has no games of at most {max_turns} turns in {split!r}")
    return games


def _game(row: Mapping[str, Any]) -> Game:
    return Game(int(row["seed"]), str(row["prompt"]), str(row["texts"]), tuple(map(str, row["gold"])))


def _read(path: Path) -> dict[str, list[Game]] | None:
    """The games in a file; None if there is none, or it is damaged: then they are listed again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(split): [_game(row) for row in rows] for split, rows in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
