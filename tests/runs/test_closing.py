"""The closing lines of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.errors import UserError
from skillsd.runs.closing import closing

METRICS = {
    "iteration": 1, "episodes": 2000, "seconds": 61.0, "summaries/submitted": 1500, "summaries/added": 1200,
    "summaries/duplicate": 290, "summaries/rejected_malformed": 10, "batch/groups_with_teacher": 0.5,
    "batch/groups_with_context": 0.5, "batch/imitated": 0.25, "rollout/dropped_groups": 0,
}  # fmt: skip
EVALUATION = {
    "iteration": 0, "episodes": 0, "eval/accuracy": 0.25, "eval/interval": [0.1, 0.5], "eval/tasks": 96,
    "eval/split": "tune",
}  # fmt: skip


def folder_of(folder: Path, metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]], **sections: Any) -> Path:
    settings: dict[str, Any] = {"name": "x", "method": "skill-sd", "rollout": {"tasks_per_iteration": 8}, **sections}
    (folder / "config.yaml").write_text(configs.dump(RunConfig.model_validate(settings)))
    for name, records in (("metrics", metrics), ("evaluations", evaluations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def two(change: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [METRICS, {**METRICS, "iteration": 2, "episodes": 4000, "rollout/dropped_groups": 4, **(change or {})}]


def test_work_gain_and_places(tmp_path: Path) -> None:
    later = {**EVALUATION, "iteration": 2, "episodes": 4000, "eval/accuracy": 0.5, "eval/interval": [0.4, 0.6]}
    folder = folder_of(tmp_path, two(), [EVALUATION, later], training={"iterations": 2})
    assert closing(folder) == [
        "4,000 episodes in 2 iterations, 1 min 01 s; 1,200 skills from 1,500 trajectories (duplicate 290, "
        "rejected_malformed 10); 6 of 12 groups with a teacher",
        "accuracy [95 % over tasks] on 96 tune tasks: before 25.0 % [10.0, 50.0], after 4,000 episodes 50.0 % "
        "[40.0, 60.0]",
        f"in {folder}/: metrics.jsonl (docs/metrics.md), trajectories/, skills: skillsd skills list {folder}",
    ]


def test_greedy_accuracy_has_its_own_line(tmp_path: Path) -> None:
    greedy = {f"eval_greedy/{name.partition('/')[2]}": value for name, value in EVALUATION.items() if "/" in name}
    lines = closing(folder_of(tmp_path, two(), [{**EVALUATION, **greedy}], training={"iterations": 2}))
    assert "on 96 tune tasks, greedy: before 25.0 % [10.0, 50.0]" in lines[2]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("grpo", []),
        ("opsd", ["with a teacher"]),
        ("skill-grpo", ["skills from", "with a skill in the student's prompt"]),
        ("grpo-imitation", ["3 of 12 groups with a success to imitate"]),
    ],
)
def test_each_method_has_its_own_counts(tmp_path: Path, method: str, words: list[str]) -> None:
    line = closing(folder_of(tmp_path, two(), [], method=method, training={"iterations": 2}))[0]
    every = ["skills from", "with a teacher", "with a skill in the student's prompt", "with a success to imitate"]
    assert [word for word in every if word in line] == [next(e for e in every if e in word) for word in words]
    for word in words:
        assert word in line


def test_findings_are_warnings(tmp_path: Path) -> None:
    silent = {"batch/groups_with_context": 0.0, "batch/groups_with_teacher": 0.0}
    metrics = [{**record, **silent} for record in two()]
    folder = folder_of(tmp_path, metrics, [EVALUATION], training={"iterations": 2})
    [warning] = [line for line in closing(folder) if line.startswith("warning: ")]
    assert warning.startswith("warning: no group had a teacher in 2 iterations, so the run is plain GRPO")
    assert "curriculum.tasks" in warning


def test_runs_without_records_or_tasks_that_could_be_played(tmp_path: Path) -> None:
    assert len(closing(folder_of(tmp_path, [], []))) == 1
    unknown = {**EVALUATION, "eval/accuracy": None, "eval/interval": [None, None]}
    assert "before unknown" in closing(folder_of(tmp_path, [], [unknown]))[0]
    with pytest.raises(UserError):
        closing(tmp_path / "nothing")
