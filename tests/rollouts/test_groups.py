"""The records of an iteration's groups: to a file and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from skillsd.errors import UserError
from skillsd.files.read import DamagedError
from skillsd.rollouts.groups import (
    RecordedEpisode,
    RecordedGroup,
    group_from_json,
    group_to_json,
    read_groups,
    write_groups,
    written_iterations,
)
from skillsd.types import Message, Outcome, Task, Trajectory, Turn

TASK = Task("t", "toy", "train", {"level": ["#", "@"]}, 2.0)


def episode(seed: int, logprob: float = -0.5, **columns: Any) -> RecordedEpisode:
    trajectory = Trajectory(
        task=TASK,
        prompt=(Message("user", "Go!"),),
        tokens=(1, 2, 3, 4),
        action_mask=(False, True, False, True),
        logprobs=(0.0, logprob, 0.0, -0.25),
        prompt_length=1,
        turns=(Turn("Up", "Over", 1, 2, {"x": 1}), Turn("Down", "\u2603\x00", 3, 4)),
        outcome=Outcome.FAILED,
        reward=1 / 3,
        success=False,
        seed=seed,
        versions=(0, 1),
    )
    return RecordedEpisode(trajectory, 0.5, **columns)


GROUP = RecordedGroup(
    iteration=3,
    task=TASK,
    context="skill",
    skill_id=7,
    context_text="Workflow: Up",
    teacher_prompt="<s>Workflow: Up Go!",
    teacher_prompt_length=5,
    student_prompt="<s>Go!",
    student_prompt_length=2,
    taught=True,
    untaught=None,
    minibatch=1,
    applied=True,
    episodes=(
        episode(1, teacher_logprobs=(-1.0, -2.0), student_logprobs=(-0.5, -0.25), divergence=(0.125, 0.0)),
        episode(2, teacher_logprobs=(-math.inf, 0.0), student_logprobs=(math.inf, -3.0), rescored_logprobs=(-1.0, 0.0)),
    ),
    imitated=replace(episode(3), trajectory=replace(episode(3).trajectory, prompt=(Message("system", "other"),))),
    token_texts={2: " Up", 4: "\n"},
)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    empty = replace(GROUP, episodes=(), imitated=None, taught=False, untaught="why", minibatch=None, applied=False)
    write_groups(tmp_path / "trajectories", 3, [GROUP, empty])
    assert list(read_groups(tmp_path / "trajectories", 3)) == [GROUP, empty]
    assert written_iterations(tmp_path / "trajectories") == [3]
    content = (tmp_path / "trajectories" / "iteration-00003.jsonl.gz").read_bytes()
    write_groups(tmp_path / "trajectories", 3, [GROUP, empty])
    assert (tmp_path / "trajectories" / "iteration-00003.jsonl.gz").read_bytes() == content


def test_numbers_per_token_have_four_decimals_and_all_others_are_exact(tmp_path: Path) -> None:
    given = episode(1, -1 / 3, student_logprobs=(-0.00001, -2 / 3))
    write_groups(tmp_path, 1, [replace(GROUP, episodes=(replace(given, advantage=2 / 3),))])
    [group] = read_groups(tmp_path, 1)
    [back] = group.episodes
    assert back.trajectory.logprobs == (0.0, -0.3333, 0.0, -0.25)
    assert (back.advantage, back.student_logprobs, back.trajectory.reward) == (0.6667, (0.0, -0.6667), 1 / 3)
    assert "-0.0" not in repr(back.student_logprobs)
    assert replace(back.trajectory, logprobs=given.trajectory.logprobs) == given.trajectory


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    write_groups(tmp_path, 1, [replace(GROUP, episodes=(episode(1, student_logprobs=(math.nan, -math.inf)),))])
    [group] = read_groups(tmp_path, 1)
    values = group.episodes[0].student_logprobs
    assert values is not None
    assert (math.isnan(values[0]), values[1]) == (True, -math.inf)


def test_gaps_are_the_teachers_logprob_minus_the_students() -> None:
    assert GROUP.episodes[0].gaps == (-0.5, -1.75)
    assert GROUP.episodes[0].old_logprobs == (-0.5, -0.25)
    assert episode(1, student_logprobs=(0.0, 0.0)).gaps is None
    assert GROUP.rewards == [1 / 3, 1 / 3]


@pytest.mark.parametrize("key", [*(f.name for f in fields(RecordedGroup)), "format", "prompt"])
def test_every_key_is_needed(key: str) -> None:
    record = group_to_json(GROUP)
    del record[key]
    with pytest.raises(ValueError, match=r"is missing|format is None"):
        group_from_json(record)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r.update(format=2), "format is 2, expected 1"),
        (lambda r: r.update(task=3), "not a group's record"),
        (lambda r: r.update(episodes=[3]), "not a group's record"),
        (lambda r: r.update(token_texts={"x": " Up"}), "not a group's record"),
        (lambda r: r.update(token_texts={"1": 3}), "another type"),
        (lambda r: r.update(iteration="3"), "another type"),
        (lambda r: r.update(teacher_prompt=3), "another type"),
        (lambda r: r.update(taught=1), "taught or applied"),
        (lambda r: r["episodes"][0].update(reward=None), "reward"),
        (lambda r: r["episodes"][0].update(more=3), "more"),
        (lambda r: r["episodes"][0].update(logprobs=[0.0]), "do not fit 2 action tokens"),
        (lambda r: r["episodes"][0].update(logprobs=[0.0] * 3), "do not fit 2 action tokens"),
        (lambda r: r["episodes"][0].update(teacher_logprobs=[0.0]), "do not fit 2 action tokens"),
        (lambda r: r["episodes"][0].update(student_logprobs=[0.0, None]), "not a group's record"),
        (lambda r: r["episodes"][0].update(advantage=None), "not a group's record"),
    ],
)
def test_an_invalid_record_is_refused(spoil: Callable[[dict[str, Any]], object], message: str) -> None:
    record = group_to_json(GROUP)
    spoil(record)
    with pytest.raises(ValueError, match=message):
        group_from_json(record)


def test_what_is_not_there_is_an_error_that_says_what_is(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "trajectories"
    with pytest.raises(UserError, match=r"run' has no trajectories of iteration 1; it has: none"):
        list(read_groups(folder, 1))
    write_groups(folder, 2, [])
    (folder / "iteration-00004.jsonl").write_text("{}")
    (folder / "iteration-x.jsonl.gz").write_text("")
    with pytest.raises(UserError, match=r"no trajectories of iteration 1; it has: 2, 4"):
        list(read_groups(folder, 1))
    with pytest.raises(UserError, match="has an earlier version's format"):
        list(read_groups(folder, 4))
    (folder / "iteration-00002.jsonl.gz").write_bytes(b"")
    with pytest.raises(DamagedError, match="is damaged"):
        list(read_groups(folder, 2))
