"""Level generation is deterministic; the panels are disjoint and solvable, with the stated difficulty."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from skillsd.envs.sokoban.levels import draw, generate, panel, panel_ids
from skillsd.envs.sokoban.presets import PRESETS
from skillsd.envs.sokoban.solver import distance_table, solve
from skillsd.errors import UserError

EXPECTED = {
    "nano": ["45e590731d222bd8", "b5a7d17386de0a4b", "84c085593149db7f"],
    "nano-hard": ["adb3882e7ac89182", "6a4b4c12b6dec858", "dba8f3f80c127523"],
    "paper": ["5036e8aa79703b53", "85498be3509b6d7e", "249cb558ba0ad601"],
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


def test_rebuilding_reproduces_the_stored_panel() -> None:
    assert tuple(draw("nano", "train", 96, set())) == panel("nano")["train"]


def test_no_level_occurs_twice() -> None:
    ids = [entry.level.id for name in PRESETS for split in panel(name).values() for entry in split]
    assert len(set(ids)) == len(ids)
    assert panel_ids() == set(ids)


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
