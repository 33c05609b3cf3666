"""Levels from explicit seeds, and the panels: the fixed sets of levels that ship with the package.

A level is found by playing backwards: in a random room, all states from which it can be solved are reached
from the solved ones by walking back and pulling, and the start is drawn among those at an allowed distance.
So the difficulty, the length of the optimal solution, is exact and comes for free.

The same seed gives the same level in every process and every Python version: all randomness is `random()` and
`getrandbits()` of `random.Random(int)`, whose streams Python guarantees, and no order of a set or a hash is
used.

Rebuild the panels with ``python -m skillsd.envs.sokoban.levels build [--preset NAME]``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar

from skillsd.envs.sokoban.board import Level
from skillsd.envs.sokoban.presets import PRESETS, Preset
from skillsd.envs.sokoban.solver import DistanceTable, distance_table
from skillsd.errors import unknown_name

PANELS = Path(__file__).parent / "panels"

T = TypeVar("T")


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items, uniformly. Unlike `Random.choice`, the draw never changes between Python versions."""
    return items[int(rng.random() * len(items))]


def stable_seed(*parts: object) -> int:
    """A 48-bit seed from words and numbers, the same everywhere (unlike `hash`)."""
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:12], 16)


@dataclass(frozen=True)
class Entry:
    """A level of a panel, its optimal solution's moves, and that solution's (fewest) pushes."""

    level: Level
    moves: int
    pushes: int


def generate(preset: Preset, seed: int) -> tuple[Entry, DistanceTable]:
    """The level of a seed, and the distances of all solvable states of its room. Any int is a good seed."""
    rng = random.Random(seed)
    while True:
        room = _random_room(preset, rng)
        if room is None:
            continue
        table = distance_table(room)
        longest = min(preset.longest, len(table.layers) - 1)
        if longest < preset.shortest:
            continue
        # First the length, then a state of that length: else the most common length would swamp the others.
        moves = preset.shortest + int(rng.random() * (longest - preset.shortest + 1))
        start = pick(rng, table.layers[moves])
        # A box that starts on a target would be a sub-goal reached for nothing.
        if table.pushes[start] >= preset.min_pushes and room.on_target(start) == 0:
            return Entry(room.at(start), moves, table.pushes[start]), table


def _random_room(preset: Preset, rng: random.Random) -> Level | None:
    """A solved room with random inner walls and targets; None if too little floor is left."""
    height, width = preset.height, preset.width
    inside = [r * width + c for r in range(1, height - 1) for c in range(1, width - 1)]
    walls = {cell for cell in range(height * width) if cell not in inside}
    spare = list(inside)
    for _ in range(preset.min_walls + int(rng.random() * (preset.max_walls - preset.min_walls + 1))):
        walls.add(spare.pop(int(rng.random() * len(spare))))
    floor = _largest_region([cell for cell in inside if cell not in walls], width)
    if len(floor) < 2 * preset.boxes + 1:
        return None
    spare = list(floor)
    targets = sorted(spare.pop(int(rng.random() * len(spare))) for _ in range(preset.boxes))
    # Floor that nobody can ever reach becomes wall, so one puzzle has one picture and one id.
    outside = tuple(cell for cell in range(height * width) if cell not in floor)
    return Level(height, width, outside, tuple(targets), tuple(targets), spare[0])


def _largest_region(floor: list[int], width: int) -> list[int]:
    """The largest connected part of the floor (of equals the one with the lowest cell), sorted."""
    best: list[int] = []
    left = set(floor)
    for first in floor:
        if first not in left:
            continue
        region = [first]
        left.discard(first)
        for cell in region:
            for step in (-width, width, -1, 1):
                if cell + step in left:  # the border is never floor, so a step can't wrap around
                    left.discard(cell + step)
                    region.append(cell + step)
        if len(region) > len(best):
            best = region
    return sorted(best)


def draw(name: str, split: str, count: int, taken: set[str]) -> list[Entry]:
    """`count` new levels of a split, easy to hard. Levels in `taken` are skipped, and the new ones added."""
    entries: list[Entry] = []
    for seed in seeds(name, split):
        if len(entries) == count:
            break
        entry, _ = generate(PRESETS[name], seed)
        if entry.level.id not in taken:
            taken.add(entry.level.id)
            entries.append(entry)
    return sorted(entries, key=lambda entry: (entry.moves, entry.pushes, entry.level.id))


def seeds(*parts: object) -> Iterator[int]:
    """An endless stream of seeds that belongs to the given words and numbers."""
    first = stable_seed(*parts)
    while True:
        yield first
        first += 1


def build(name: str) -> dict[str, list[Entry]]:
    """Draw all splits of a preset. Levels in the stored panels of the presets before it are avoided."""
    earlier = list(PRESETS)[: list(PRESETS).index(name)]
    taken = {entry.level.id for other in earlier for split in panel(other).values() for entry in split}
    return {split: draw(name, split, count, taken) for split, count in PRESETS[name].splits.items()}


def to_json(splits: dict[str, list[Entry]]) -> str:
    """The text of a panel's file: one level a line, so that a diff can be read."""
    blocks = []
    for split, entries in splits.items():
        lines = ",\n".join(
            json.dumps(
                {"id": e.level.id, "moves": e.moves, "pushes": e.pushes, "rows": e.level.rows()},
                separators=(",", ":"),
            )
            for e in entries
        )
        blocks.append(f'"{split}":[\n{lines}\n]')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


@cache
def panel(name: str) -> dict[str, tuple[Entry, ...]]:
    """The stored panel of a preset: its levels by split. Raises UserError for an unknown preset."""
    if name not in PRESETS:
        raise unknown_name("Sokoban preset", name, PRESETS)
    stored = json.loads((PANELS / f"{name}.json").read_text())
    return {
        split: tuple(Entry(Level.from_rows(row["rows"]), row["moves"], row["pushes"]) for row in rows)
        for split, rows in stored.items()
    }


@lru_cache(maxsize=1)
def panel_ids() -> frozenset[str]:
    """Ids of all levels in all panels of all presets: none of them may be seen in the warm start."""
    stored = (json.loads((PANELS / f"{name}.json").read_text()) for name in PRESETS)
    return frozenset(row["id"] for splits in stored for rows in splits.values() for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: rebuild one panel, or all in order."""
    parser = argparse.ArgumentParser(prog="python -m skillsd.envs.sokoban.levels")
    parser.add_argument("command", choices=["build"])
    parser.add_argument("--preset", choices=list(PRESETS), help="only this one (default: all, in order)")
    options = parser.parse_args(arguments)
    for name in [options.preset] if options.preset else PRESETS:
        splits = build(name)
        path = PANELS / f"{name}.json"
        path.write_text(to_json(splits))
        panel.cache_clear()
        panel_ids.cache_clear()
        print(f"{path}: " + ", ".join(f"{len(entries)} {split}" for split, entries in splits.items()))


if __name__ == "__main__":
    main()
