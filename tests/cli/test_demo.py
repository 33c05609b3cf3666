"""The demo on a budget of seconds: its output is complete."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from skillsd.cli.demo import PARTS, _verdict, run_demo

SMALL = [
    "training.iterations=2",
    "rollout.tasks_per_iteration=4",
    "rollout.group_size=4",
    "evaluation.limit=8",
    "log.tensorboard=false",
]


@pytest.mark.slow  # twelve commands; `.ci/run` runs the whole demo
@pytest.mark.timeout(900)
def test_the_demo_writes_a_summary_pictures_and_its_runs(tmp_path: Path) -> None:
    output = io.StringIO()
    run_demo(tmp_path / "demo", [0], SMALL, Console(file=output, width=120))
    summaries = json.loads((tmp_path / "demo" / "summary.json").read_text())
    text = output.getvalue()
    assert {name: summary["tasks"] for name, summary in summaries.items()} == {"rulebook": 128, "sokoban": 512}
    for part in PARTS:
        summary = summaries[part.name]
        for name in ("base", *part.methods):
            row = summary[name]
            assert row["episodes"] == (0 if name == "base" else 32)
            assert 0 <= row["interval"][0] <= row["accuracy"] <= row["interval"][1] <= 1
            assert row["completion"] == row["accuracy"], "all or nothing"
            assert (row["seconds"] > 0) == (name != "base")
        assert (tmp_path / "demo" / part.name / "learning-curves.png").stat().st_size > 10_000
        assert _verdict(part, summary) in text.replace("\n", " ")
    assert text.count("skills were written for the teacher") == 2
    shown = [line.split(",")[0] for line in text.splitlines() if line.startswith("  task ")]
    assert len(shown) == len(set(shown)) == 6
    assert text.count("from a failure") >= 2
    assert not re.search(r"@r\dc\d", text), "in words"
    assert re.search(r"The \w+ is (red|blue|green|white|black|gold)\.", text)
    assert str(tmp_path) in text.replace("\n", "")

    # The same command again repeats nothing.
    metrics = tmp_path / "demo" / "sokoban" / "nano" / "grpo" / "seed-0" / "metrics.jsonl"
    before = metrics.read_bytes()
    run_demo(tmp_path / "demo", [0], SMALL, Console(file=io.StringIO(), width=120))
    assert metrics.read_bytes() == before


@pytest.mark.parametrize(
    ("interval", "expected"),
    [([0.1, 0.3], "a skill teaches here"), ([-0.1, 0.3], "no gain"), ([-0.2, -0.1], "skills do harm")],
)
def test_the_verdict_says_no_more_than_the_interval(interval: list[float], expected: str) -> None:
    part = PARTS[0]
    rows = {"grpo": {"accuracy": 0.1}, "skill-sd-frozen": {"accuracy": 0.3, "difference": {"mean": 0.2}}}
    rows["skill-sd-frozen"]["difference"]["interval"] = interval  # type: ignore[index]
    assert expected in _verdict(part, rows)
