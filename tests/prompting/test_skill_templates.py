"""Skill templates: their syntax, and where a context stands in the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skillsd.errors import UserError
from skillsd.prompting.templates import load_template, render_skill, with_context
from skillsd.types import Message, Skill

WORKFLOW, MISTAKE = "@r2c2 Right @r2c3 Up", "never @r1c3 Left"


def test_context_is_added_to_the_last_user_message() -> None:
    system, user, shot, last = (
        Message("system", "S"),
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three"),
    )
    assert with_context((system, user), " more", "after") == (system, Message("user", "one more"))
    assert with_context((system, user, shot, last), "!", "after") == (system, user, shot, Message("user", "three!"))
    assert with_context((system, user, shot, last), "!", "before") == (system, user, shot, Message("user", "!three"))
    prefilled = with_context((user, shot), "!", "after")
    assert prefilled == (Message("user", "one!"), shot)


@pytest.mark.parametrize("separator", ["", " ", "\n\n", " \n"])
def test_leading_white_space_separates_the_context_on_either_side(separator: str) -> None:
    context, task = f"{separator}the skill \n", (Message("user", " the task "),)
    assert with_context(task, context, "after") == (Message("user", f" the task {separator}the skill \n"),)
    assert with_context(task, context, "before") == (Message("user", f"the skill \n{separator} the task "),)
    assert with_context(task, "", "before") == with_context(task, "", "after") == task


@pytest.mark.parametrize("messages", [(), (Message("system", "S"), Message("assistant", "A"))])
def test_prompt_without_a_user_message_is_an_error(messages: tuple[Message, ...]) -> None:
    with pytest.raises(ValueError, match="last user message"):
        with_context(messages, "x", "before")


@pytest.mark.parametrize(
    ("skill", "text"),
    [
        (Skill("it worked", MISTAKE, WORKFLOW), " Workflow: @r2c2 Right @r2c3 Up Mistake: never @r1c3 Left"),
        (Skill("it worked", "", WORKFLOW), " Workflow: @r2c2 Right @r2c3 Up"),
        (Skill("it worked", MISTAKE, ""), " Mistake: never @r1c3 Left"),
        (
            Skill("", f"{MISTAKE}\n", f"  {WORKFLOW}"),
            " Workflow: @r2c2 Right @r2c3 Up Mistake: never @r1c3 Left",
        ),
    ],
)
def test_terse_template(skill: Skill, text: str) -> None:
    assert render_skill(skill, load_template("teacher_terse")) == text


def test_default_template() -> None:
    text = render_skill(Skill("a", "", "c\nd"), load_template("teacher"))
    introduction, *rest = text.removeprefix("\n\n").split("\n")
    assert text.startswith("\n\nNotes from an earlier attempt")
    assert introduction.endswith(".")
    assert not {"above", "below", "following"} & set(introduction.split())  # it may stand on either side of the task
    assert rest == ["What worked: a", "Steps to follow: c", "d"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("x {success_analysis}\ny {mistake_analysis}\nz {golden_workflow}", "x A\nz C"),
        ("x {success_analysis}\\\ny {mistake_analysis}\\\n z {golden_workflow}", "x A z C"),
        ("{success_analysis} not {mistake_analysis}\n{golden_workflow}", "C"),
        ("{success_analysis}, {golden_workflow}; {{braces}} stay", "A, C; {braces} stay"),
        ("{golden_workflow}\\", "C"),
        ("\n\n{golden_workflow}\n", "\n\nC\n"),
    ],
)
def test_syntax(template: str, text: str) -> None:
    assert render_skill(Skill("A", "", "C"), template) == text


@given(st.text(min_size=1).filter(str.strip))
def test_braces_and_backslashes_in_a_skill_have_no_meaning(value: str) -> None:
    assert render_skill(Skill("", "", value), "<{golden_workflow}>") == f"<{value.strip()}>"
    assert render_skill(Skill("{golden_workflow}\\", "", "x"), "{success_analysis}\n!") == "{golden_workflow}\\\n!"


def test_empty_skill_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty skill"):
        render_skill(Skill("", " ", ""), load_template("teacher"))


class TestLoading:
    def test_own_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.txt"
        path.write_text("Do: {golden_workflow}\n")
        assert load_template(path) == load_template(str(path)) == "Do: {golden_workflow}"

    def test_error_for_an_unknown_name_names_the_nearest(self) -> None:
        with pytest.raises(UserError, match=r"'teacher_tense'.*Did you mean 'teacher_terse'"):
            load_template("teacher_tense")

    @pytest.mark.parametrize("name", ["missing.txt", "some/where"])
    def test_missing_file(self, name: str) -> None:
        with pytest.raises(UserError, match="cannot read the template"):
            load_template(name)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("Do: {workflow}", "unknown field.*expected .*{golden_workflow}"),
            ("Do: {}", "unknown field"),
            ("Do: {golden_workflow!r}", "unknown field"),
            ("Do: {golden_workflow:>5}", "unknown field"),
            ("Do: {golden_workflow.__class__}", "unknown field"),
            ("Do: {golden_workflow", "cannot read the line"),
            ("Do: }", "cannot read the line"),
            ("Do your best", "contains no field"),
            ("", "contains no field"),
        ],
    )
    def test_malformed_template_is_refused(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "bad.txt"
        path.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            load_template(path)
        assert "bad.txt" in str(caught.value)
