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


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    tokens = draw(st.lists(st.tuples(st.integers(0), st.booleans(), floats), max_size=5))
    places = st.integers(0, len(tokens))
    spans = draw(st.lists(st.tuples(texts, texts, st.tuples(places, places), payloads), max_size=3))
    return Trajectory(
        task=draw(tasks),
        prompt=tuple(draw(st.lists(messages, max_size=3))),
        tokens=tuple(token for token, _, _ in tokens),
        action_mask=tuple(sampled for _, sampled, _ in tokens),
        logprobs=tuple(logprob for _, _, logprob in tokens),
        prompt_length=draw(places),
        turns=tuple(Turn(action, answer, min(at), max(at), info) for action, answer, at, info in spans),
        outcome=draw(st.sampled_from(Outcome)),
        reward=draw(floats),
        success=draw(st.booleans()),
        seed=draw(st.integers()),
        error=draw(texts),
        versions=draw(st.none() | st.tuples(st.integers(0), st.integers(0))),
    )


@given(trajectories())
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
        (lambda r: r.update(task=[]), "not a trajectory record"),
        (lambda r: r.update(logprobs=[0.0]), "3 tokens, 3 in the mask, 1 log-probs"),
        (lambda r: r.update(tokens=[1, 2, "3"]), "tokens are integers"),
        (lambda r: r.update(logprobs=[None] * 3), "log-probs numbers"),
        (lambda r: r.update(prompt_length=4), "a span is outside"),
        (lambda r: r["turns"][0].update(end=4), "a span is outside"),
        (lambda r: r["turns"][0].update(end=None), "not a trajectory record"),
        (lambda r: r["turns"][0].update(action=3), "another type"),
        (lambda r: r["turns"][0].update(info=None), "another type"),
        (lambda r: r["task"].update(id=3), "another type"),
        (lambda r: r.update(reward="1"), "another type"),
        (lambda r: r.update(seed=0.5), "another type"),
        (lambda r: r.update(versions=[1]), "versions are"),
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
