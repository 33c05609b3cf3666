"""Trajectories as JSON and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skillsd.rollouts.records import trajectory_from_json, trajectory_to_json
from skillsd.types import Message, Outcome, Task, Trajectory, Turn

# Any text, including lone surrogates, which a tokenizer may produce.
texts = st.text(st.characters(exclude_categories=()), max_size=20)
floats = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(st.none() | st.booleans() | st.integers() | floats | texts, st.lists, max_leaves=5)
payloads = st.dictionaries(texts, values, max_size=3)
tasks = st.builds(Task, texts, texts, texts, payloads, floats)
messages = st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts)
turns = st.builds(Turn, texts, texts, st.integers(0), st.integers(0), payloads)


def tuples(elements: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(elements, max_size=5).map(tuple)


trajectories = st.builds(
    Trajectory,
    task=tasks,
    prompt=tuples(messages),
    tokens=tuples(st.integers(0)),
    action_mask=tuples(st.booleans()),
    logprobs=tuples(floats),
    prompt_length=st.integers(0),
    turns=tuples(turns),
    outcome=st.sampled_from(Outcome),
    reward=floats,
    success=st.booleans(),
    seed=st.integers(),
    error=texts,
    versions=st.none() | st.tuples(st.integers(0), st.integers(0)),
)


@given(trajectories)
def test_round_trip_is_exact(trajectory: Trajectory) -> None:
    line = json.dumps(trajectory_to_json(trajectory))
    assert "\n" not in line
    back = trajectory_from_json(json.loads(line))
    assert back == trajectory
    assert repr(back) == repr(trajectory)  # True is not 1, 1.0 is not 1, -0.0 is not 0.0


TRAJECTORY = Trajectory(
    task=Task("t", "toy", "train"),
    prompt=(Message("user", "Go!"),),
    tokens=(1, 2, 3),
    action_mask=(False, True, False),
    logprobs=(0.0, -0.5, 0.0),
    prompt_length=1,
    turns=(Turn("Up", "Over", 1, 2),),
    outcome=Outcome.FAILED,
    reward=0.5,
    success=False,
    seed=7,
    versions=(0, 1),
)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r.update(format=1), "format is 1, expected 2"),
        (lambda r: r.pop("format"), "format is None"),
        (lambda r: r.pop("task"), "'task' is missing"),
        (lambda r: r.pop("reward"), "reward"),
        (lambda r: r.pop("versions"), "'versions' is missing"),
        (lambda r: r.update(extra=1), "extra"),
        (lambda r: r.update(outcome="won"), "won"),
        (lambda r: r.update(turns=3), "not a trajectory record"),
        (lambda r: r["task"].update(colour="red"), "colour"),
        (lambda r: r.update(prompt=["hello"]), "not a trajectory record"),
    ],
)
def test_invalid_record_is_refused(spoil: Callable[[dict[str, Any]], object], message: str) -> None:
    record = trajectory_to_json(TRAJECTORY)
    spoil(record)
    with pytest.raises(ValueError, match=message):
        trajectory_from_json(record)


def test_non_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="format is 'list'"):
        trajectory_from_json([])  # type: ignore[arg-type]
