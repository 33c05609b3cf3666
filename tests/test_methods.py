"""The table of methods, and the consistency of its rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from skillsd.errors import UserError
from skillsd.methods import METHODS, method, methods_table


def test_grpo_has_no_teacher_and_skill_sd_is_as_in_the_paper() -> None:
    grpo, skill_sd = method("grpo"), method("skill-sd")
    assert (grpo.reward_weight, grpo.lambda_sdl, grpo.context, grpo.teacher) == (1, 0, "none", "none")
    assert (skill_sd.reward_weight, skill_sd.lambda_sdl, skill_sd.normaliser) == (1, 0.001, "tokens")
    assert (skill_sd.context, skill_sd.teacher) == ("skill", "synchronised")


def test_in_both_the_student_samples_under_the_plain_prompt() -> None:
    for row in (method("grpo"), method("skill-sd")):
        assert (row.student_prompt, row.sampler) == ("plain", "student")


def test_rows_are_stored_under_their_names() -> None:
    assert all(METHODS[name].name == name and method(name) is METHODS[name] for name in METHODS)


def test_the_error_for_an_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'skill-sd'"):
        method("skillsd")


@pytest.mark.parametrize(
    "changes",
    [
        {"lambda_sdl": 0.0},  # a teacher without weight
        {"teacher": "none"},  # a weight without a teacher
        {"teacher": "none", "lambda_sdl": 0.0},  # a context without a teacher
        {"teacher": "none", "lambda_sdl": 0.0, "context": "none", "sampler": "teacher"},
        {"teacher": "none", "lambda_sdl": 0.0, "context": "none", "reward_weight": 0.0},  # no signal
        {"context": "none"},  # a teacher equal to the student
        {"lambda_sdl": -0.1},
        {"reward_weight": -1.0},
    ],
)
def test_inconsistent_switches_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'skill-sd'"):
        dataclasses.replace(method("skill-sd"), **changes)


@pytest.mark.parametrize(
    ("name", "switches"),
    [  # reward weight, lambda, normaliser, imitation, teacher's context, teacher's weights, student's prompt, sampler
        ("grpo", (1, 0, "tokens", 0, "none", "none", "plain", "student")),
        ("opd", (0, 1, "taught", 0, "skill", "synchronised", "plain", "student")),
        ("opd-external", (0, 1, "taught", 0, "none", "external", "plain", "student")),
        ("opsd", (0, 1, "taught", 0, "oracle", "frozen", "plain", "student")),
        ("grpo-opsd", (1, 0.001, "tokens", 0, "oracle", "frozen", "plain", "student")),
        ("grpo-opsd-synchronised", (1, 0.001, "tokens", 0, "oracle", "synchronised", "plain", "student")),
        ("skill-grpo", (1, 0, "tokens", 0, "none", "none", "skill", "student")),
        ("skill-sd", (1, 0.001, "tokens", 0, "skill", "synchronised", "plain", "student")),
        ("skill-sd-frozen", (1, 0.001, "tokens", 0, "skill", "frozen", "plain", "student")),
        ("teacher-rollouts", (1, 0.001, "tokens", 0, "skill", "synchronised", "plain", "teacher")),
        ("teacher-rollouts-frozen", (1, 0.001, "tokens", 0, "skill", "frozen", "plain", "teacher")),
        ("grpo-imitation", (1, 0, "tokens", 0.1, "none", "none", "plain", "student")),
    ],
)
def test_the_rows_are_those_of_the_paper_and_a_control(name: str, switches: tuple[Any, ...]) -> None:
    _, *values, _ = dataclasses.astuple(METHODS[name])
    assert tuple(values) == switches
    assert len(METHODS) == 12


def test_the_table_contains_every_switch() -> None:
    header, rule, *rows = methods_table().splitlines()
    assert len({len(line) for line in (header, rule, *rows)}) == 1
    assert [row.split("|")[1].strip() for row in rows] == list(METHODS)
    cells = [cell.strip() for cell in rows[list(METHODS).index("skill-sd")].strip("|").split("|")]
    assert cells == ["skill-sd", "1", "0.001", "tokens", "0", "skill", "synchronised", "plain", "student"]
    assert len(methods_table([method("grpo")]).splitlines()) == 3
