"""What a run writes: records that survive a crash, and valid JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from skillsd.config import LogSection
from skillsd.files.write import write_whole
from skillsd.report.manifest import model, weights_fingerprint
from skillsd.report.pictures import learning_curves
from skillsd.report.progress import duration
from skillsd.report.tables import percent
from skillsd.report.writer import EVALUATIONS, METRICS, RunWriter, read

PLAIN = LogSection(tensorboard=False)


def iterations(folder: Path) -> list[int]:
    return [record["iteration"] for record in read(folder / METRICS)]


def test_records_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, PLAIN, name="x")
    for i in range(1, 6):
        writer.iteration({"iteration": i})
        writer.evaluation({"iteration": i})
    writer.close()
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"iteration": 6, "cut o')
    assert iterations(tmp_path) == [1, 2, 3, 4, 5]
    RunWriter(tmp_path, PLAIN, name="x", resumed_at=3).iteration({"iteration": 4})
    assert iterations(tmp_path) == [1, 2, 3, 4]
    assert [record["iteration"] for record in read(tmp_path / EVALUATIONS)] == [1, 2, 3]
    RunWriter(tmp_path, PLAIN, name="x")
    assert iterations(tmp_path) == []


def test_values_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    seen: list[Any] = []
    writer = RunWriter(tmp_path, PLAIN, name="x", on_record=lambda kind, record: seen.append((kind, record)))
    writer.iteration({"iteration": 1, "a": float("nan"), "b": float("inf"), "c": 0.5})
    [line] = (tmp_path / METRICS).read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"iteration": 1, "a": None, "b": None, "c": 0.5}
    assert seen[0][0] == "iteration"


def test_tensorboard_event_files(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, LogSection(), name="x")
    writer.iteration({"iteration": 1, "loss": 0.25, "text": "left out"})
    writer.close()
    [events] = list((tmp_path / "tensorboard").iterdir())
    assert b"loss" in events.read_bytes()


def test_percentages_and_durations() -> None:
    assert percent(0.5123, (0.469, 0.555)) == "51.2 % [46.9, 55.5]"
    day = 24 * 3600
    assert [duration(s) for s in (-1, 59.4, 60, 3599, 3660, 2 * day - 1, 2 * day, 6552 * day)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 01 min",
        "47 h 59 min",
        "2 days",
        "18 years",
    ]


def test_learning_curves_of_runs_of_different_lengths(tmp_path: Path) -> None:
    def curve(*accuracies: float) -> list[dict[str, float | None]]:
        return [{"episodes": 100.0 * i, "eval/accuracy": a} for i, a in enumerate(accuracies)]

    runs = {
        "grpo": [curve(0.2, 0.3), curve(0.2, 0.4, 0.5)],
        "skill-sd": [[*curve(0.2), {"episodes": 100.0, "eval/accuracy": None}]],
    }
    learning_curves(runs, tmp_path / "curves.png", title="t", split="tune")
    band = [{**record, "eval/interval": [0.1, 0.3]} for record in curve(0.2, 0.25)]
    learning_curves({"grpo": [band]}, tmp_path / "banded.png", title="t", split="tune", base=0.2)
    learning_curves({"grpo": [curve(0.2, 0.25)]}, tmp_path / "plain.png", title="t", split="tune")
    assert (tmp_path / "banded.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_fingerprint_of_weights_depends_on_the_weight_files_alone(tmp_path: Path) -> None:
    assert weights_fingerprint(str(tmp_path)) is None
    assert weights_fingerprint("nobody/such-a-model") is None
    (tmp_path / "config.json").write_text("{}")
    assert weights_fingerprint(str(tmp_path)) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"ignored next to safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    assert weights_fingerprint(str(tmp_path)) == hashlib.sha256(b"onetwo").hexdigest()[:16]
    (tmp_path / "config.json").write_text('{"another": "tokenizer"}')
    assert weights_fingerprint(str(tmp_path)) == hashlib.sha256(b"onetwo").hexdigest()[:16]
    shipped = weights_fingerprint("nano")
    assert shipped
    assert len(shipped) == 16


def test_a_model_is_identified_by_all_files_that_decide_its_answers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = model(str(tmp_path))
    assert (before["name"], None in before.values()) == (str(tmp_path), False)
    (tmp_path / "README.md").write_text("about")
    assert model(str(tmp_path)) == before
    seen = [before["files"]]
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_text('{"changed": 1}')
        now = model(str(tmp_path))
        assert now["weights"] == before["weights"]
        assert now["files"] not in seen, name
        seen.append(now["files"])
    assert model("nobody/such-a-model") == {"name": "nobody/such-a-model", "weights": None, "files": None}


def test_files_are_written_atomically_and_devices_directly(tmp_path: Path) -> None:
    write_whole(tmp_path / "x.json", "1")
    write_whole(tmp_path / "x.json", "2")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.json", "2")]
    write_whole(Path("/dev/null"), "3")
