"""`benchmarks/vs_trl.py` still runs on today's code, and the work is what it was."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_step_does_the_expected_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks" / "contestants"), str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    import vs_trl
    import workload
    from comparison import Collected, Job

    workload.make_model(tmp_path / "model")
    script, options = vs_trl.STEPS["ours-skill-sd"]
    job = Job("ours-skill-sd", "step", (2,), {"job": "step", "turns": 2, "steps": 1, **options}, 1.0)
    result = vs_trl.run(job, tmp_path / "model", {script: sys.executable}, tmp_path / "log")
    assert "rollout" in Collected().add(job, result)  # it raises if the numbers of tokens are not as expected
