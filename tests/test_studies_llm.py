"""studies/llm: existing measurements are collected, and none is repeated."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "studies" / "llm"


@pytest.fixture(scope="module")
def measure() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("measure")


def evaluation(successes: list[float | None]) -> dict[str, Any]:
    finished = [one for one in successes if one is not None]
    figures = {
        "accuracy": sum(finished) / len(finished), "interval": [0.0, 1.0], "tasks": len(finished),
        "episodes": len(finished),
        "turns": 9, "invalid_turns": 1, "sampled_tokens": 20, "mean_turns": 3.0, "outcomes": {}, "seconds": 1.0,
        "fingerprint": "f", "iteration": None, "budget": {}, "model": {}, "successes": successes, "temperature": 1.0,
    }  # fmt: skip
    return {"command": "skillsd eval", "figures": [figures], "measured": {}}


def collect(measure: ModuleType, folder: Path) -> tuple[int, dict[str, Any]]:
    out = folder / "llm.json"
    places = ["--base", str(folder / "base"), "--run", str(folder / "run"), "--json", str(out)]
    code: int = measure.main(["collect", str(folder / "parts"), *places])
    return code, json.loads(out.read_text())


def test_existing_parts_are_collected_and_missing_ones_listed(
    measure: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NO_PROXY", "")
    for name in ("parts", "base", "run"):
        (tmp_path / name).mkdir()
    parts = {
        "evaluation-warm-start": evaluation([0, 0, 1, None, 0]),
        "evaluation-trained": evaluation([1, 0, 1, 1, None]),
        "gap-torch-float32": {"before": {"mean": 1.23456789e-6}},
        "server-warm-start": {"eval": {}},
    }
    for name, content in parts.items():
        (tmp_path / "parts" / f"{name}.json").write_text(json.dumps(content))
    rows = [
        {"iteration": n, "episodes": 4 * n, "rollout/tokens": 100.0, "rollout/sampled_tokens_per_second": 5.0,
         "time/rollout": 8.0 * n, "time/update": 20.0, "time/iteration": 28.0}
        for n in (1, 2)
    ]  # fmt: skip
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"command": ["x", "train", "r"], "started": "", "commit": "", "versions": {}, "model": {}, "seed": 0}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(known))

    code, found = collect(measure, tmp_path)
    assert code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "evaluation-untouched.json" in line
    assert "memory-lora-bfloat16.json" in line
    assert "warm_start.json" in line
    assert "evaluation-trained.json" not in line
    assert found["missing"] == line.removeprefix("missing: ").split(", ")
    assert found["accuracy"]["trained"]["sampled"]["accuracy"] == 0.75
    difference = found["differences"]["trained minus warm-start, sampled"]
    assert difference["difference"] == pytest.approx(1 / 3, abs=1e-4)  # over the levels that both have finished
    assert (difference["levels"], difference["gained"], difference["lost"]) == (3, 1, 0)
    assert found["gap"]["torch-float32"]["before"]["mean"] == 1.2346e-6
    assert found["server"] == {"warm-start": {"eval": {}}}
    training = found["training"]
    assert (training["iterations"], training["episodes"]) == (2, 8)
    assert training["seconds"]["rollout"] == {"mean": 12.0, "median": 12.0, "min": 8.0, "max": 16.0}
    assert training["tokens_per_second"]["update, all"]["mean"] == 20.0  # 4 episodes of 100 tokens in 20 s


def test_an_existing_part_is_not_measured_again(measure: ModuleType, tmp_path: Path) -> None:
    parts = importlib.import_module("parts")
    parts.part(tmp_path, "one", lambda: {"figure": 1})
    parts.part(tmp_path, "one", lambda: {"figure": 2})
    written = json.loads((tmp_path / "one.json").read_text())
    assert written["figure"] == 1
    assert {"commit", "load", "versions"} <= written["measured"].keys()


@pytest.mark.parametrize("name", ["evaluations", "gap", "server", "memory"])
def test_every_measurement_can_be_imported(measure: ModuleType, name: str) -> None:
    assert callable(getattr(importlib.import_module(name), name))
