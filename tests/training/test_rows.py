"""Every row of the table of methods runs through the one loop, and its switches do what they say."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from toy_env import Toy
from toy_run import MakeRun, go

from skillsd.errors import UserError
from skillsd.methods import METHODS
from skillsd.types import Task


class WithOracle(Toy):
    def oracle(self, task: Task) -> str | None:
        return f"@r1c1 {task.payload['target']}"


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.engine.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_trains(name: str, make_run: MakeRun) -> None:
    row = METHODS[name]
    run = make_run(method=name, toy=WithOracle(), training={"iterations": 3})
    before = weights(run)
    heard = go(run)
    assert not same(weights(run), before)
    taught = [record["batch/groups_with_teacher"] for record in heard.iterations]
    told = {"none": [0.0] * 3, "oracle": [1.0] * 3}.get(row.context)
    assert taught == told if told else (taught[0] == 0 and taught[-1] > 0)
    assert (len(run.bank) > 0) == (row.context == "skill")
    if row.teacher == "frozen":
        assert same(run.engine._teacher, {n: before[n] for n in run.engine._teacher}), "the teacher moved"  # type: ignore[attr-defined]


def test_without_a_reward_and_without_a_teacher_there_is_nothing_to_learn(make_run: MakeRun) -> None:
    run = make_run(method="opd", training={"iterations": 1})  # the bank is empty at the first visit
    before = weights(run)
    go(run)
    assert same(weights(run), before)


def test_a_row_whose_switches_are_not_built_is_refused(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for change in ({"student_prompt": "skill"}, {"sampler": "teacher"}, {"teacher": "external"}):
        monkeypatch.setitem(METHODS, "new", dataclasses.replace(METHODS["skill-sd"], name="new", **change))
        with pytest.raises(UserError, match="not built yet"):
            make_run(method="new")


def test_an_environment_without_reference_solutions_has_no_oracle_to_tell(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="reference solution"):
        make_run(method="opsd")
