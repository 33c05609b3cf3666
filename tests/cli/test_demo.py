"""The demo on a budget of seconds: its output is complete."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from skillsd.cli.demo import run_demo

SMALL = [
    "training.iterations=2",
    "rollout.tasks_per_iteration=4",
    "rollout.group_size=4",
    "evaluation.limit=8",
    "log.tensorboard=false",
]


@pytest.mark.slow  # six commands; `.ci/run` runs the whole demo
@pytest.mark.timeout(900)
def test_the_demo_writes_a_summary_a_picture_and_its_runs(tmp_path: Path) -> None:
    output = io.StringIO()
    run_demo(tmp_path / "demo", [0], SMALL, Console(file=output, width=120))
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for name, episodes in (("base", 0), ("grpo", 32), ("skill-sd", 32)):
        row = summary[name]
        assert row["episodes"] == episodes
        assert 0 <= row["interval"][0] <= row["accuracy"] <= row["interval"][1] <= 1
        assert row["completion"] == row["accuracy"], "one box: all or nothing"
        assert (row["seconds"] > 0) == bool(episodes)
    assert summary["tasks"] == 512
    assert (tmp_path / "demo" / "learning-curves.png").stat().st_size > 10_000
    text = output.getvalue()
    assert "accuracy" in text
    assert "skills were written for the teacher" in text
    shown = [line.split()[1] for line in text.splitlines() if line.startswith("  level ")]
    assert len(shown) == len(set(shown)) == 3
    assert not re.search(r"@r\dc\d", text), "in words"
    assert str(tmp_path) in text.replace("\n", "")

    # The same command again repeats nothing.
    before = (tmp_path / "demo" / "nano" / "grpo" / "seed-0" / "metrics.jsonl").read_bytes()
    run_demo(tmp_path / "demo", [0], SMALL, Console(file=io.StringIO(), width=120))
    assert (tmp_path / "demo" / "nano" / "grpo" / "seed-0" / "metrics.jsonl").read_bytes() == before
