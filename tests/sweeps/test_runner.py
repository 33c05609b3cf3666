"""Parallel processes: a failure does not affect the others, and after an interruption nothing is repeated."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from toy_run import toy_settings

from skillsd.cli.app import main
from skillsd.cli.common import console as shown
from skillsd.errors import UserError
from skillsd.report.writer import METRICS, read
from skillsd.sweeps.runner import Job, last_record, locked, run_jobs

TESTS = Path(__file__).parents[1]


def job(folder: Path, name: str, *scripts: str) -> Job:
    return Job(name, [[sys.executable, "-c", script] for script in scripts], folder / f"{name}.log")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


# -- jobs -----------------------------------------------------------------------------------------------------------


def test_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    console = quiet()
    jobs = [
        job(tmp_path, "bad", "print('first')", "import sys; print('what went wrong'); sys.exit(3)", "open('no', 'w')"),
        job(tmp_path, "good", "print(1)", f"open({str(tmp_path / 'made')!r}, 'w')"),
    ]
    [failure] = run_jobs(jobs, console, at_once=1, what="cells")
    assert (failure.name, failure.code, failure.tail) == ("bad", 3, "what went wrong")
    assert str(tmp_path / "bad.log") in str(failure)
    assert (tmp_path / "made").exists()
    assert "bad failed; the others continue" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "cells: 2/2 1 failed" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_number_of_parallel_jobs(tmp_path: Path) -> None:
    script = f"""
import os, pathlib, time
mine = pathlib.Path({str(tmp_path)!r}, f"on-{{os.getpid()}}")
mine.touch()
pathlib.Path({str(tmp_path)!r}, f"saw-{{os.getpid()}}").write_text(str(len(list(mine.parent.glob("on-*")))))
time.sleep(0.6)
mine.unlink()
"""
    assert run_jobs([job(tmp_path, f"j{i}", script) for i in range(4)], quiet(), at_once=2, what="cells") == []
    assert max(int(path.read_text()) for path in tmp_path.glob("saw-*")) == 2


def test_a_folder_is_locked_until_its_last_process_has_ended(tmp_path: Path) -> None:
    with locked(tmp_path) as lock, pytest.raises(UserError, match="another process is using"), locked(tmp_path):
        pass
    with locked(tmp_path) as lock:
        assert lock is not None
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    with pytest.raises(UserError, match="another process"), locked(tmp_path):
        pass
    child.communicate(b"\n")
    with locked(tmp_path):
        pass


def test_the_last_record(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert last_record(path) is None
    lines = [json.dumps({"iteration": i, "pad": "x" * 500}) for i in range(300)]
    path.write_text("\n".join([*lines, '{"iteration": 3']))
    assert last_record(path)["iteration"] == 299  # type: ignore[index]


# -- a sweep that is stopped and resumed ---------------------------------------------------------------------------


def test_a_stopped_sweep_is_resumed_and_repeats_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(shown, "_width", 300)
    slow = toy_settings(tiny_model, environment={"options": {"delay": 0.02}}, checkpoint={"every": 3})
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(slow))
    # It passes the checks of the configuration and fails when it runs.
    (tmp_path / "v.yaml").write_text("broken: {method: skill-sd, curriculum.tasks: 999}")
    out = tmp_path / "out"
    arguments = ["table", str(tmp_path / "toy.yaml"), "--episodes", "36,72", "--out", str(out), "--jobs", "2"]
    both = [*arguments, "--methods", "grpo,broken", "--variants", str(tmp_path / "v.yaml")]
    model = out / tiny_model.name
    run = model / "grpo" / "seed-0"

    def skillsd(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["skillsd", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    process = subprocess.Popen(
        [sys.executable, "-m", "skillsd", *both], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not read(run / METRICS) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (output, errors)
    assert "the same command resumes" in output
    assert "Traceback" not in errors
    reached = len(read(run / METRICS))
    assert 1 <= reached < 6
    assert "stopped and saved" in (model / "grpo" / "seed-0.log").read_text()

    code, output, errors = skillsd(*both)
    assert code == 1, (output, errors)
    assert "1 of 3 cells failed" in output
    assert "curriculum.tasks is 999" in output
    assert str(model / "broken" / "seed-0.log") in output
    assert [record["iteration"] for record in read(run / METRICS)] == [1, 2, 3, 4, 5, 6]
    table = json.loads((out / "table.json").read_text())
    for budget in ("36", "72"):
        rows = table["budgets"][budget]
        assert (rows["base"]["cells"], rows["grpo"]["cells"], rows["broken"]["cells"]) == (1, 1, 0)
        assert rows["grpo"]["episodes"] == int(budget)
        assert rows["broken"]["accuracy"] is None
    weights = table["models"][tiny_model.name]["weights"]
    assert len(weights) == 16
    assert json.loads((run / "manifest.json").read_text())["model"]["weights"] == weights
    assert (table["split"], table["tasks"]) == ("test", 3)
    # Resumed, and with the records of an uninterrupted run.
    sampled, greedy = (json.loads((model / "grpo" / "seed-0.test.json").read_text()))[2:]
    assert (sampled["iteration"], sampled["temperature"], greedy["temperature"]) == (6, 1.0, 0.0)
    assert sum(sampled["successes"]) / 3 == pytest.approx(sampled["accuracy"])
    assert "0 of 1" in output

    # Again: nothing is repeated.
    def touched() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in model.rglob("*") if path.is_file()}

    before = touched()
    code, output, errors = skillsd(*arguments, "--methods", "grpo")
    assert code == 0, (output, errors)
    assert "2 cells, 2 of them done" in output
    assert before == touched()
    code, output, _ = skillsd(*both, "--dry-run")
    assert code == 0
    assert output.count("skillsd train") == 1
    assert "2 of 3 done" in output
    assert before == touched()

    # Longer, and with more samples: existing results are neither lost nor repeated, and all checkpoints are kept.
    played = json.loads((model / "grpo" / "seed-0.test.json").read_text())
    checkpoints = set(os.listdir(run / "checkpoints"))
    longer = ["table", str(tmp_path / "toy.yaml"), "--episodes", "108", "--out", str(out), "--methods", "grpo"]
    code, output, errors = skillsd(*longer)
    assert code == 0, (output, errors)
    assert json.loads((model / "grpo" / "seed-0.test.json").read_text())[: len(played)] == played
    assert set(os.listdir(run / "checkpoints")) == {*checkpoints, "step-9"} >= {"step-3", "step-6"}
    code, output, errors = skillsd(*arguments[:-2], "--methods", "grpo", "--samples", "2")
    assert code == 0, (output, errors)
    records = json.loads((model / "grpo" / "seed-0.test.json").read_text())
    asked = [(r["iteration"], r["samples"]) for r in records if r["temperature"]]
    assert sorted(asked) == [(3, 1), (3, 2), (6, 1), (6, 2), (9, 1)]
    before = touched()
    for episodes in ("36,72", "108", "36,72,108"):
        longer[3] = episodes
        code, output, errors = skillsd(*longer)
        assert code == 0, (output, errors)
        assert "2 cells, 2 of them done" in output
    assert before == touched()
