"""The table of methods: what is in it, and that a row can't contradict itself."""

from __future__ import annotations

import dataclasses

import pytest

from skillsd.errors import UserError
from skillsd.methods import METHODS, method, methods_table


def test_grpo_has_no_teacher_and_skill_sd_is_the_papers_row():
    grpo, skill_sd = method("grpo"), method("skill-sd")
    assert (grpo.reward_weight, grpo.lambda_sdl, grpo.context, grpo.teacher) == (1, 0, "none", "none")
    assert (skill_sd.reward_weight, skill_sd.lambda_sdl) == (1, 0.001)
    assert (skill_sd.context, skill_sd.teacher) == ("skill", "synchronised")


def test_in_both_the_student_samples_and_sees_no_skill():
    for row in (method("grpo"), method("skill-sd")):
        assert (row.student_prompt, row.sampler) == ("plain", "student")


def test_rows_are_found_under_their_own_names():
    assert all(METHODS[name].name == name and method(name) is METHODS[name] for name in METHODS)


def test_an_unknown_method_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'skill-sd'"):
        method("skillsd")


@pytest.mark.parametrize(
    "changes",
    [
        {"lambda_sdl": 0.0},  # a teacher that weighs nothing
        {"teacher": "none"},  # a weight for no teacher
        {"teacher": "none", "lambda_sdl": 0.0},  # a context, and nobody to read it
        {"teacher": "none", "lambda_sdl": 0.0, "context": "none", "sampler": "teacher"},
        {"teacher": "none", "lambda_sdl": 0.0, "context": "none", "reward_weight": 0.0},  # no signal
        {"context": "none"},  # a teacher that is the student and knows what it knows
        {"lambda_sdl": -0.1},
        {"reward_weight": -1.0},
    ],
)
def test_switches_that_contradict_each_other_are_refused(changes):
    with pytest.raises(ValueError, match="'skill-sd'"):
        dataclasses.replace(method("skill-sd"), **changes)


@pytest.mark.parametrize(
    ("name", "switches"),
    [  # reward weight, lambda, imitation, teacher's context, teacher's weights, student's prompt, sampler
        ("grpo", (1, 0, 0, "none", "none", "plain", "student")),
        ("opd", (0, 1, 0, "skill", "synchronised", "plain", "student")),
        ("opd-external", (0, 1, 0, "none", "external", "plain", "student")),
        ("opsd", (0, 1, 0, "oracle", "frozen", "plain", "student")),
        ("grpo-opsd", (1, 0.001, 0, "oracle", "frozen", "plain", "student")),
        ("grpo-opsd-synchronised", (1, 0.001, 0, "oracle", "synchronised", "plain", "student")),
        ("skill-grpo", (1, 0, 0, "none", "none", "skill", "student")),
        ("skill-sd", (1, 0.001, 0, "skill", "synchronised", "plain", "student")),
        ("skill-sd-frozen", (1, 0.001, 0, "skill", "frozen", "plain", "student")),
        ("teacher-rollouts", (1, 0.001, 0, "skill", "synchronised", "plain", "teacher")),
        ("teacher-rollouts-frozen", (1, 0.001, 0, "skill", "frozen", "plain", "teacher")),
        ("grpo-imitation", (1, 0, 0.1, "none", "none", "plain", "student")),
    ],
)
def test_the_rows_are_those_of_the_papers_tables_and_the_control(name, switches):
    _, *values, _ = dataclasses.astuple(METHODS[name])
    assert tuple(values) == switches
    assert len(METHODS) == 12


def test_the_table_shows_every_switch_of_every_row():
    header, rule, *rows = methods_table().splitlines()
    assert len({len(line) for line in (header, rule, *rows)}) == 1
    assert [row.split("|")[1].strip() for row in rows] == list(METHODS)
    cells = [cell.strip() for cell in rows[list(METHODS).index("skill-sd")].strip("|").split("|")]
    assert cells == ["skill-sd", "1", "0.001", "0", "skill", "synchronised", "plain", "student"]
    assert len(methods_table([method("grpo")]).splitlines()) == 3
