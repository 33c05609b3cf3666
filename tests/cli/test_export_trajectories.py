"""`skillsd export-trajectories`: where the files go, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Command, assert_one_line
from recorded_run import recorded_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return recorded_run(tmp_path / "run")


def test_files_go_into_the_runs_folder_or_where_they_are_wanted(skillsd: Command, run: Path, tmp_path: Path) -> None:
    said = skillsd("export-trajectories", run, "--to", "jsonl")
    assert said.out == f"5 episodes of 2 iterations -> {run}/exports/trajectories.jsonl\n"
    assert len((run / "exports" / "trajectories.jsonl").read_text().splitlines()) == 5
    said = skillsd("export-trajectories", run, "--to", "atif", "--out", tmp_path / "elsewhere", "--iteration", 3)
    assert said.out.startswith("3 episodes of 1 iterations -> ")
    names = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert names == ["3.0.0.json", "3.0.1.json", "3.1.0.json"]
    assert json.loads((tmp_path / "elsewhere" / "3.0.0.json").read_text())["schema_version"] == "ATIF-v1.7"


def test_mistakes_are_one_line(skillsd: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for words, parts in (
        ([run], ["--to"]),
        ([run, "--to", "csv"], ["'csv'", "atif, inspect, jsonl, trackio"]),
        ([run, "--to", "trackio", "--out", tmp_path / "x"], ["$TRACKIO_DIR"]),
        ([tmp_path, "--to", "jsonl"], ["is not a run's folder"]),
        ([run, "--to", "jsonl", "--iteration", 2], ["no trajectories of iteration 2; it has: 1, 3"]),
        ([run, "--to", "jsonl", "--out", tmp_path], ["is a folder: give the name of a file"]),
        ([run, "--to", "jsonl", "--out", tmp_path / "gone" / "x"], ["there is no folder"]),
        ([run, "--to", "atif", "--out", tmp_path / "file"], ["is the file", "a file per episode"]),
    ):
        assert_one_line(skillsd("export-trajectories", *words), *parts)
    assert (tmp_path / "file").read_text() == "mine"
    file = run / "trajectories" / "iteration-00003.jsonl.gz"
    content = file.read_bytes()
    out = tmp_path / "good.jsonl"
    out.write_text("good\n")
    file.write_bytes(content[:-20])
    damaged = skillsd("export-trajectories", run, "--to", "jsonl", "--out", out)
    assert_one_line(damaged, "iteration-00003.jsonl.gz' is damaged")
    assert out.read_text() == "good\n"
    for path in (run / "trajectories").iterdir():
        path.unlink()
    assert_one_line(skillsd("export-trajectories", run, "--to", "jsonl"), "has no episodes to export")
