"""The summariser's prompt, condensing long episodes, and parsing answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skillsd.errors import UserError
from skillsd.prompting.templates import load_template
from skillsd.skills.summarise import SummaryError
from skillsd.skills.summary_prompt import MAX_ANSWER_CHARS, SummaryPrompt, load_prompt, parse_skill
from skillsd.types import Message, Outcome, Skill, Trajectory, Turn

Make = Callable[..., Trajectory]
SKILL = {"success_analysis": "Left first.", "mistake_analysis": "", "golden_workflow": "Left, then up."}


def prompt(template: str | None = None, limit: int = 100_000) -> SummaryPrompt:
    text = load_prompt("summarise") if template is None else template
    return SummaryPrompt(text, max_chars=700, max_input_chars=limit)


# -- the template ---------------------------------------------------------------------------------------------------


def test_shipped_prompt_contains_everything(trajectory_with: Make) -> None:
    trajectory = trajectory_with(outcome=Outcome.TRUNCATED_TURNS, success=False, reward=0.5)
    text, condensed = prompt().render(trajectory)
    assert not condensed
    for words in (
        "You are in a maze of four rooms",
        "Turn 1\nAction: red\nObservation: You went through the red door.\n\nTurn 2\nAction: green",
        "not solved within the turns allowed; 50% of it",
        "at most 700 characters",
        *(f'"{name}": ' for name in SKILL),
    ):
        assert words in text
    assert "{" not in text


def test_braces_in_an_episode_are_not_fields(trajectory_with: Make) -> None:
    turns = (Turn("print({x!r})", "{prompt} {{}}", 2, 3),)
    text, _ = prompt("{{literal}} {trajectory}").render(trajectory_with(turns=turns))
    assert text == "{literal} Turn 1\nAction: print({x!r})\nObservation: {prompt} {{}}"


def test_own_file(tmp_path: Path, trajectory: Trajectory) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("{outcome}: {trajectory}\n")
    text, _ = prompt(load_prompt(file)).render(trajectory)
    assert text.startswith("solved: Turn 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("What happened?", r"lacks the field \{trajectory\}"),
        ("{trajectories}", r"unknown field in the line '\{trajectories\}'; expected \{prompt\}, \{trajectory\}"),
        ("{trajectory!r}", "unknown field"),
        ("{trajectory} {", "cannot read the line"),
    ],
)
def test_invalid_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_prompt(file)


def test_skill_templates_and_summary_prompts_have_separate_names() -> None:
    with pytest.raises(UserError, match=r"unknown template 'teacher'.* Known: summarise$"):
        load_prompt("teacher")
    with pytest.raises(UserError, match=r"Known: teacher, teacher_terse$"):
        load_template("summarise")
    with pytest.raises(UserError, match="cannot read"):
        load_prompt("./missing.txt")


# -- condensing -----------------------------------------------------------------------------------------------------


def long_episode(make: Make, turns: int, chars: int, prompt_chars: int = 20) -> Trajectory:
    return make(
        prompt=(Message("user", "p" * prompt_chars),),
        turns=tuple(Turn(f"act {i}", f"seen {i} " + "x" * chars + f" end {i}", i, i + 1) for i in range(1, turns + 1)),
    )


def test_long_observations_are_cut_before_turns_are_left_out(trajectory_with: Make) -> None:
    trajectory = long_episode(trajectory_with, turns=4, chars=3000)
    text, condensed = prompt("{trajectory}", limit=3000).render(trajectory)
    assert condensed
    assert len(text) <= 3000
    for number in range(1, 5):
        assert f"seen {number} xxx" in text
        assert f"xxx end {number}" in text
    assert "[2513 characters are left out]" in text
    assert "turns" not in text


def test_first_and_last_turns_are_kept(trajectory_with: Make) -> None:
    trajectory = long_episode(trajectory_with, turns=40, chars=100)
    text, _ = prompt("{trajectory}", limit=2000).render(trajectory)
    kept = [number for number in range(1, 41) if f"Turn {number}\n" in text]
    assert kept == [1, 2, *range(33, 41)]
    assert "[turns 3 to 32 are left out]" in text


def test_first_prompt_is_cut_last(trajectory_with: Make) -> None:
    trajectory = long_episode(trajectory_with, turns=6, chars=10, prompt_chars=50_000)
    text, _ = prompt("{prompt}\n{trajectory}", limit=1500).render(trajectory)
    assert "[turns 2 to 5 are left out]" in text
    assert "[49000 characters are left out]" in text


def test_error_if_it_cannot_fit(trajectory: Trajectory) -> None:
    with pytest.raises(SummaryError) as error:
        prompt("{trajectory}").render(trajectory, lambda text: False)
    assert error.value.reason == "failed_no_room"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.integers(0, 60),
    chars=st.integers(0, 6000),
    prompt_chars=st.integers(0, 9000),
    limit=st.integers(2000, 9000),
)
def test_any_episode_fits_and_keeps_its_ends(
    trajectory_with: Make, turns: int, chars: int, prompt_chars: int, limit: int
) -> None:
    trajectory = long_episode(trajectory_with, turns, chars, prompt_chars)
    text, condensed = prompt("{prompt}\n{trajectory}", limit).render(trajectory)
    assert len(text) <= limit
    if turns:
        assert "Turn 1\n" in text
        assert f"Turn {turns}\n" in text
    whole, _ = prompt("{prompt}\n{trajectory}", 10**9).render(trajectory)
    assert condensed == (text != whole) == (len(whole) > limit)


# -- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps(SKILL),
        f"```json\n{json.dumps(SKILL, indent=2)}\n```",
        f"<think>{{not json}} {json.dumps({**SKILL, 'golden_workflow': 'a draft'})}</think>\n{json.dumps(SKILL)}",
        json.dumps({"skill": SKILL}),
        json.dumps(SKILL).replace("Left first.", "\n Left first.\n"),  # an unescaped line break in a string
    ],
)
def test_answers_with_a_skill(answer: str) -> None:
    assert parse_skill(answer) == Skill(**SKILL)
    assert parse_skill(answer, cut=True) == Skill(**SKILL)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("I cannot help with that.", "malformed"),
        (json.dumps(SKILL)[:-1], "malformed"),
        (json.dumps({**SKILL, "score": 1}), "malformed"),
        (json.dumps({**SKILL, "golden_workflow": None}), "malformed"),
        ("[" * 9000, "malformed"),
        ('{"a":' * 9000, "malformed"),
        ("{" * 9000, "malformed"),
        ("x" * (MAX_ANSWER_CHARS + 1), "too_long"),
    ],
)
def test_answers_without_a_skill(answer: str, reason: str) -> None:
    with pytest.raises(SummaryError) as error:
        parse_skill(answer)
    assert error.value.reason == f"rejected_{reason}"
    with pytest.raises(SummaryError) as error:
        parse_skill(answer, cut=True)
    assert error.value.reason == "rejected_too_long"
