"""Which skills are accepted, and how summarisers are wrapped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from skillsd.skills.summarise import RuleSummariser, SkillSchema, check_skill
from skillsd.types import Message, Skill, Trajectory, Turn


def check(steps: str, trajectory: Trajectory, max_chars: int = 1000) -> str | None:
    return check_skill(Skill("", "", steps), trajectory, max_chars=max_chars)


def quote(trajectory: Trajectory, turns: int, layout: str = "{0}\n{1}") -> str:
    return "\n".join(layout.format(turn.action, turn.observation) for turn in trajectory.turns[1 : 1 + turns])


def test_function_as_a_summariser(trajectory: Trajectory, skill: Skill) -> None:
    assert asyncio.run(RuleSummariser(lambda t: skill).summarise(trajectory)) == skill
    assert asyncio.run(RuleSummariser(lambda t: None).summarise(trajectory)) is None


def test_valid_skill_is_accepted(trajectory: Trajectory, skill: Skill) -> None:
    assert check_skill(skill, trajectory, max_chars=1000) is None
    assert check("red, green, red, blue. You went through the red door.", trajectory) is None


@pytest.mark.parametrize(
    "invalid",
    [
        "a string",
        {"golden_workflow": "x"},
        Skill(None, "", "x"),  # type: ignore[arg-type]
        Skill("", ["x"], ""),  # type: ignore[arg-type]
        Skill("", "", "\ud800"),
    ],
)
def test_malformed(trajectory: Trajectory, invalid: object) -> None:
    assert check_skill(invalid, trajectory, max_chars=1000) == "malformed"


def test_empty(trajectory: Trajectory) -> None:
    assert check_skill(Skill("", "", ""), trajectory, max_chars=1000) == "empty"
    assert check_skill(Skill(" ", "\n", "\t"), trajectory, max_chars=1000) == "empty"


def test_length_limit_is_per_field(trajectory: Trajectory) -> None:
    assert check("x" * 50, trajectory, max_chars=50) is None
    assert check("x" * 51, trajectory, max_chars=50) == "too_long"
    assert check_skill(Skill("x" * 50, "y" * 50, "z" * 50), trajectory, max_chars=50) is None


class TestCopies:
    def test_of_the_prompt(self, trajectory: Trajectory) -> None:
        prompt = trajectory.prompt[-1].content
        assert check(f"The task: {prompt} So go red.", trajectory) == "copies_prompt"
        assert check(prompt.replace(" ", "\n  "), trajectory) == "copies_prompt"
        assert check("You are in a maze of four rooms. Go red.", trajectory) is None  # only part of the prompt
        assert check("Be brief.", trajectory) is None  # a short message may be quoted

    def test_of_a_long_stretch_of_a_long_prompt(self, trajectory_with: Callable[..., Trajectory]) -> None:
        words = [f"word{i}" for i in range(200)]
        trajectory = trajectory_with(prompt=(Message("user", " ".join(words)),))
        assert check(" ".join(words[100:139]), trajectory) is None
        assert check(" ".join(words[100:140]), trajectory) == "copies_prompt"

    @pytest.mark.parametrize(
        "layout",
        [
            "{0}\n{1}",
            "{0}   {1}",
            "Assistant: {0}\nUser: {1}",
            "Turn 3: Action: {0} Observation: {1}",
        ],
    )
    def test_of_turns(self, trajectory: Trajectory, layout: str) -> None:
        assert check("First: " + quote(trajectory, 2, layout), trajectory) is None
        assert check("First " + quote(trajectory, 3, layout), trajectory) == "copies_trajectory"

    def test_of_turns_across_fields(self, trajectory: Trajectory) -> None:
        skill = Skill(quote(trajectory, 1), *quote(trajectory, 3).split("\n", 2)[2].split("\n", 1))
        assert check_skill(skill, trajectory, max_chars=1000) == "copies_trajectory"

    def test_list_of_actions_is_allowed(self, trajectory_with: Callable[..., Trajectory]) -> None:
        turns = tuple(Turn("Up", "", i, i + 1) for i in range(9))
        assert check("Up " * 9, trajectory_with(turns=turns)) is None

    def test_partial_words_do_not_count(self, trajectory_with: Callable[..., Trajectory]) -> None:
        turns = tuple(Turn("a", "b", i, i + 1) for i in range(4))
        assert check("xa b a b a bx", trajectory_with(turns=turns)) is None
        assert check("x a b a b a b x", trajectory_with(turns=turns)) == "copies_trajectory"


class TestFormat:
    DESCRIPTIONS = tuple(str(field.description) for field in SkillSchema.model_fields.values())

    @pytest.mark.parametrize("text", DESCRIPTIONS)
    @pytest.mark.parametrize("place", range(3))
    def test_copy_of_a_description(self, trajectory: Trajectory, text: str, place: int) -> None:
        for copy in (text, text.removesuffix(" May be empty."), text.upper(), f"* {text.replace(' ', '  ')}\n"):
            fields = ["", "", ""]
            fields[place] = copy
            assert check_skill(Skill(*fields), trajectory, max_chars=1000) == "copies_format"
            fields[place - 1] = "Go red."  # even if another field has content
            assert check_skill(Skill(*fields), trajectory, max_chars=1000) == "copies_format"

    @pytest.mark.parametrize("text", DESCRIPTIONS)
    def test_description_with_more_text_is_allowed(self, trajectory: Trajectory, text: str) -> None:
        assert check(f"{text} The red door, then the blue one.", trajectory) is None
        assert check(f"Red. {text}", trajectory) is None

    @pytest.mark.parametrize("text", ["Right", "What worked", "Right. May be.", "were right", "steps to follow"])
    def test_few_words_of_a_description_are_allowed(self, trajectory: Trajectory, text: str) -> None:
        assert check(text, trajectory) is None


class TestSecrets:
    @pytest.mark.parametrize("text", ["It is 4217.", "Say ANNA\n Lee", "anna lee's", "(4217)"])
    def test_secret_is_found(self, trajectory: Trajectory, text: str) -> None:
        skill = Skill("", text, "Go red.")
        assert check_skill(skill, trajectory, max_chars=1000, secrets=("4217", "Anna Lee")) == "leaks_answer"
        assert check_skill(skill, trajectory, max_chars=1000) is None

    @pytest.mark.parametrize("text", ["It is 42170.", "Annabel Lee", "ananna lee", "x4217"])
    def test_part_of_a_word_is_not_a_secret(self, trajectory: Trajectory, text: str) -> None:
        assert check_skill(Skill("", text, ""), trajectory, max_chars=1000, secrets=("4217", "Anna Lee", " ")) is None


class TestSchema:
    def test_round_trip(self, skill: Skill) -> None:
        text = json.dumps({field: getattr(skill, field) for field in skill.__dataclass_fields__})
        assert SkillSchema.model_validate_json(text).to_skill() == skill

    @pytest.mark.parametrize(
        "text",
        [
            '{"success_analysis": "", "mistake_analysis": ""}',
            '{"success_analysis": "", "mistake_analysis": "", "golden_workflow": 3}',
            '{"success_analysis": "", "mistake_analysis": "", "golden_workflow": null}',
            '{"success_analysis": "", "mistake_analysis": "", "golden_workflow": "", "score": "1"}',
            "[]",
            "the skill is",
        ],
    )
    def test_other_json_is_refused(self, text: str) -> None:
        with pytest.raises(ValidationError):
            SkillSchema.model_validate_json(text)

    def test_json_schema_is_strict(self) -> None:
        schema = SkillSchema.model_json_schema()
        assert schema["additionalProperties"] is False
        assert sorted(schema["required"]) == ["golden_workflow", "mistake_analysis", "success_analysis"]
        assert {field["type"] for field in schema["properties"].values()} == {"string"}
