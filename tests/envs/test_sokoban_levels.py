"""Level generation is deterministic; the panels are disjoint and solvable, with the stated difficulty."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import fmean

import pytest

from skillsd.envs.sokoban.board import Level
from skillsd.envs.sokoban.levels import PANELS, build, generate, panel, panel_ids, to_json
from skillsd.envs.sokoban.presets import PRESETS
from skillsd.envs.sokoban.solver import distance_table, solve
from skillsd.errors import UserError

EXPECTED = {
    "nano": ["b6451f92794cdb56", "bb883e4cea2f9b1e", "b42976cad3c93a27"],
    "nano-hard": ["98ac9f21d3fbedbd", "537d0f07af8923da", "1d73d1698f30f20a"],
    "paper": ["fb53e9fb1e7bf5bb", "06457a71cae38a47", "c03e740b414081bf"],
}

SCRIPT = (
    "from skillsd.envs.sokoban.levels import generate; from skillsd.envs.sokoban.presets import PRESETS;"
    "print(*[generate(PRESETS[n], s)[0].level.id for n in ('nano', 'paper') for s in (0, 1, 2)])"
)


def test_seeds_give_the_expected_levels() -> None:
    found = {name: [generate(PRESETS[name], seed)[0].level.id for seed in range(3)] for name in EXPECTED}
    assert found == EXPECTED


@pytest.mark.parametrize("hash_seed", ["0", "4321"])
def test_seeds_give_the_same_levels_in_another_process(hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == EXPECTED["nano"] + EXPECTED["paper"]


@pytest.mark.parametrize("name", ["nano", "verl-agent"])
def test_rebuilding_reproduces_the_stored_panel(name: str) -> None:
    assert to_json(build(name)) == (PANELS / f"{name}.json").read_text()


def test_no_puzzle_occurs_twice_in_the_panels_of_all_presets() -> None:
    """In particular, no held-out level is a training level that is shifted, turned, or has another starting place.

    The ids are computed anew from the stored rows, and compared with the stored ones.
    """
    seen: dict[str, str] = {}
    for name in PRESETS:
        for split, rows in json.loads((PANELS / f"{name}.json").read_text()).items():
            for place, row in enumerate(rows):
                level = Level.from_rows(row["rows"])
                here = f"{name}/{split}[{place}]"
                assert level.id == row["id"], here
                assert level.id not in seen, f"{here} is the same puzzle as {seen[level.id]}"
                seen[level.id] = here
    assert panel_ids() == seen.keys()


def test_the_splits_are_alike() -> None:
    """In small rooms each split must get its share of the common puzzles, not what the earlier splits left over."""
    for name, splits in (("nano", ("tune", "test")), ("nano-hard", ("tune", "test"))):
        walls = {split: fmean(len(e.level.walls) for e in panel(name)[split]) for split in ("train", *splits)}
        moves = {split: fmean(e.moves for e in panel(name)[split]) for split in ("train", *splits)}
        for split in splits:
            assert abs(walls[split] - walls["train"]) < 0.2, name
            assert abs(moves[split] - moves["train"]) < 0.25, name


@pytest.mark.parametrize("name", PRESETS)
def test_panels_match_their_preset(name: str) -> None:
    preset = PRESETS[name]
    stored = panel(name)
    assert {split: len(entries) for split, entries in stored.items()} == dict(preset.splits)
    assert [e.moves for e in stored["train"]] == sorted(e.moves for e in stored["train"])
    for entries in stored.values():
        for entry in entries:
            assert (entry.level.height, entry.level.width) == (preset.height, preset.width)
            assert len(entry.level.boxes) == preset.boxes
            assert preset.shortest <= entry.moves <= preset.longest <= preset.max_steps
            assert entry.pushes >= preset.min_pushes
        for entry in entries[::29]:
            solution = solve(entry.level)
            assert solution is not None
            assert len(solution) == entry.moves
            assert distance_table(entry.level).pushes[entry.level.start] == entry.pushes


def test_an_unknown_preset_is_an_error() -> None:
    with pytest.raises(UserError, match="Did you mean 'nano'"):
        panel("nanoo")
