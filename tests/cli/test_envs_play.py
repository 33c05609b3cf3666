"""`skillsd envs play`, with level files."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from command import Command, assert_one_line

LEVELS = "; 1\n#####\n#@$.#\n#####\n\n; 2\n######\n#@$ .#\n######\n"


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.xsb").write_text(LEVELS)
    monkeypatch.setattr(sys, "stdin", io.StringIO("d\nd\nq\n"))


def test_a_level_file_is_played(skillsd: Command) -> None:
    said = skillsd("envs", "play", "sokoban", "--levels", "mine.xsb", "--task", 1)
    assert said.code == 0, said
    assert "######\n# @$.#\n######" in said.out
    assert "Solved in 2 turns, reward 1.00." in said.out


def test_it_is_short_for_the_option(skillsd: Command) -> None:
    said = skillsd("envs", "play", "sokoban", "levels={train: mine.xsb}", "max_steps=1", "--task", 1)
    assert "Not solved in 1 turns" in said.out
    twice = skillsd("envs", "play", "sokoban", "levels=mine.xsb", "--levels", "mine.xsb")
    assert_one_line(twice, "levels is given twice")


def test_errors_are_one_line(skillsd: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.xsb").write_text("; 1\n#####\n#@x.#\n#####\n")
    assert_one_line(skillsd("envs", "play", "sokoban", "--levels", "bad.xsb"), "bad.xsb:3:", "'x'")
    assert_one_line(skillsd("envs", "play", "sokoban", "--levels", "none.xsb"), "can't read", "none.xsb")
    assert_one_line(skillsd("envs", "play", "appworld", "--levels", "mine.xsb"), "option of the environment", "levels")
    assert_one_line(skillsd("envs", "play", "sokoban", "--levels", "mine.xsb", "--split", "tune"), "tune", "test")
