"""Seeded level generation, and the panels: the fixed sets of levels in the package.

Generation works backwards: in a random room, a search from the solved states (stepping back and pulling) enumerates all
solvable states, and the initial state is drawn from those at an allowed distance. The difficulty (length of the optimal
solution) is therefore exact and needs no further search.

A seed gives the same level in every process and Python version: all randomness comes from `random()` of
`random.Random(int)`, whose stream Python guarantees, and nothing depends on set order or hashes.

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
    """A uniform random item. Unlike `Random.choice`, stable across Python versions."""
    return items[int(rng.random() * len(items))]


def stable_seed(*parts: object) -> int:
    """A 48-bit seed from strings and numbers; unlike `hash`, the same in every process."""
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:12], 16)


@dataclass(frozen=True)
class Entry:
    """A level with the number of moves of its optimal solution, and the fewest pushes among optimal solutions."""

    level: Level
    moves: int
    pushes: int


def generate(preset: Preset, seed: int) -> tuple[Entry, DistanceTable]:
    """Generate the level of a seed (any int), with the distance table of its room."""
    rng = random.Random(seed)
    while True:
        room = _random_room(preset, rng)
        if room is None:
            continue
        table = distance_table(room)
        longest = min(preset.longest, len(table.layers) - 1)
        if longest < preset.shortest:
            continue
        # Draw the length first, then a state at that distance; otherwise the most common length would dominate.
        moves = preset.shortest + int(rng.random() * (longest - preset.shortest + 1))
        start = pick(rng, table.layers[moves])
        # A box that starts on a target would earn reward without any action.
        if table.pushes[start] >= preset.min_pushes and room.on_target(start) == 0:
            return Entry(room.at(start), moves, table.pushes[start]), table


def _random_room(preset: Preset, rng: random.Random) -> Level | None:
    """A solved room with random inner walls and targets; None if it has too little floor."""
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
    # Unreachable floor becomes wall, so that equivalent levels have the same text and id.
    outside = tuple(cell for cell in range(height * width) if cell not in floor)
    return Level(height, width, outside, tuple(targets), tuple(targets), spare[0])


def _largest_region(floor: list[int], width: int) -> list[int]:
    """The largest connected region of the floor, sorted. Ties go to the region with the lowest cell."""
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


def draw(name: str, taken: set[str]) -> dict[str, list[Entry]]:
    """Draw a preset's splits, each sorted from easy to hard. Skips ids in `taken`, and adds the new ones to it.

    The splits are filled in step, each from its own stream of seeds. Small rooms allow few different puzzles, so a
    split that is drawn last would get mostly rare ones: not the distribution of the others.
    """
    sizes = PRESETS[name].splits
    streams = {split: seeds(name, split) for split in sizes}
    drawn: dict[str, list[Entry]] = {split: [] for split in sizes}
    while open_splits := [split for split in sizes if len(drawn[split]) < sizes[split]]:
        split = min(open_splits, key=lambda split: len(drawn[split]) / sizes[split])
        for seed in streams[split]:
            entry, _ = generate(PRESETS[name], seed)
            if entry.level.id not in taken:
                break
        taken.add(entry.level.id)
        drawn[split].append(entry)
    for entries in drawn.values():
        entries.sort(key=lambda entry: (entry.moves, entry.pushes, entry.level.id))
    return drawn


def seeds(*parts: object) -> Iterator[int]:
    """An infinite sequence of seeds derived from the given strings and numbers."""
    first = stable_seed(*parts)
    while True:
        yield first
        first += 1


def build(name: str) -> dict[str, list[Entry]]:
    """Draw the splits of a preset, without puzzles that are in the stored panels of earlier presets."""
    earlier = list(PRESETS)[: list(PRESETS).index(name)]
    taken = {entry.level.id for other in earlier for split in panel(other).values() for entry in split}
    return draw(name, taken)


def to_json(splits: dict[str, list[Entry]]) -> str:
    """The content of a panel file: one level per line, for readable diffs."""
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
    """A preset's stored panel, by split. Raises UserError for an unknown preset."""
    if name not in PRESETS:
        raise unknown_name("Sokoban preset", name, PRESETS)
    stored = json.loads((PANELS / f"{name}.json").read_text())
    return {
        split: tuple(Entry(Level.from_rows(row["rows"]), row["moves"], row["pushes"]) for row in rows)
        for split, rows in stored.items()
    }


@lru_cache(maxsize=1)
def panel_ids() -> frozenset[str]:
    """Ids of all levels in all panels. The warm start excludes them."""
    stored = (json.loads((PANELS / f"{name}.json").read_text()) for name in PRESETS)
    return frozenset(row["id"] for splits in stored for rows in splits.values() for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: rebuild one panel, or all of them in order."""
    parser = argparse.ArgumentParser(prog="python -m skillsd.envs.sokoban.levels")
    parser.add_argument("command", choices=["build"])
    parser.add_argument("--preset", choices=list(PRESETS), help="rebuild only this preset [all, in order]")
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
