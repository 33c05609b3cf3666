"""What `skillsd.engines.base` does itself, with a learner and a sampler that only record calls."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from skillsd.engines.base import Engine, Sampler, TokenSequence, WeightsHandle, wanted_by
from skillsd.engines.options import Capabilities
from skillsd.errors import UserError
from skillsd.objective import CHOSEN, WHOLE, Loss


class FakeLearner:
    """Also a base class of one that samples the teacher."""

    version = 3

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def publish(self, folder: Path | None = None) -> WeightsHandle:
        self.calls.append(("publish", folder))
        return WeightsHandle(self.version, folder and str(folder))

    async def load_state(self, folder: Path) -> None:
        self.calls.append(("load_state", folder))
        self.version = 9

    def close(self) -> None:
        self.calls.append("close")


class FakeSampler(Sampler):
    def __init__(self, inbox: Path | None = None, samples_teacher: bool = False) -> None:
        self.inbox, self.samples_teacher = inbox, samples_teacher
        self.calls: list[Any] = []

    async def sample(self, request: Any) -> Any: ...

    def end_session(self, session: str) -> None: ...

    async def load(self, weights: WeightsHandle) -> None:
        self.calls.append(weights)

    def close(self) -> None:
        self.calls.append("close")


class Both(FakeSampler, FakeLearner):
    """A learner that can sample."""


def engine(learner: Any, sampler: Any) -> Engine:
    return Engine(learner, sampler, "fake", Capabilities())


def test_marks_are_checked() -> None:
    with pytest.raises(ValueError, match="first token"):
        TokenSequence((1, 2), (True, False))
    with pytest.raises(ValueError, match="marks"):
        TokenSequence((1, 2), (True,))
    assert TokenSequence((1, 2, 3), (False, True, True)).marked == 2


def test_weights_are_published_into_the_samplers_inbox() -> None:
    learner, remote, local = FakeLearner(), FakeSampler(Path("/inbox")), FakeSampler()
    asyncio.run(engine(learner, remote).publish())
    asyncio.run(engine(learner, local).publish())
    assert learner.calls == [("publish", Path("/inbox")), ("publish", None)]
    assert remote.calls == [WeightsHandle(3, "/inbox")]
    assert local.calls == [WeightsHandle(3, None)]


def test_restored_weights_are_published() -> None:
    learner, sampler = FakeLearner(), FakeSampler()
    asyncio.run(engine(learner, sampler).load_state(Path("/checkpoint")))
    assert learner.calls == [("load_state", Path("/checkpoint")), ("publish", None)]
    assert sampler.calls == [WeightsHandle(9)]


def test_teacher_is_sampled_by_the_sampler_or_else_by_the_learner() -> None:
    plain, able = FakeSampler(), FakeSampler(samples_teacher=True)
    learner = Both(samples_teacher=True)
    for sampler in (plain, able):
        assert engine(learner, sampler).sampler_of("student") is sampler
    assert engine(learner, able).sampler_of("teacher") is able
    assert engine(learner, plain).sampler_of("teacher") is learner
    for unable in (FakeLearner(), Both()):
        with pytest.raises(UserError, match="'fake' can't sample from the teacher"):
            engine(unable, plain).sampler_of("teacher")


def test_both_roles_are_closed_and_one_object_once() -> None:
    learner, sampler, both = FakeLearner(), FakeSampler(), Both()
    engine(learner, sampler).close()
    engine(both, both).close()
    assert learner.calls == sampler.calls == both.calls == ["close"]


def test_plain_function_wants_the_chosen_tokens() -> None:
    assert wanted_by(lambda student, signals: (student.chosen.sum(), {})) == CHOSEN
    assert wanted_by(Loss((), {}, WHOLE)) == WHOLE
