"""Tasks in SimpleNote."""

from __future__ import annotations

from random import Random

from .. import texts
from ..lives import World
from ..people import Person
from .base import DONE, Draw, Scenario, Turn, login

LOST_NOTE = """notes = apis.simple_note.search_notes(access_token=token, sort_by="+created_at")
apis.simple_note.delete_note(note_id=notes[0]["note_id"], access_token=token)"""
STRAY_NOTE = 'apis.simple_note.create_note(title="Stray", content="", access_token=token)'


def draw_note(world: World, person: Person, rng: Random) -> Draw:
    notes = texts.NEW_NOTES[person.pool]
    title = rng.choice(sorted(notes))
    note = {"title": title, "content": rng.choice(notes[title])}
    return Draw(note, note)


def evaluate_note(test, public_data, private_data, main_user, models, ground_truth_answer):
    notes = of_user(added(models, "simple_note.Note"), "user", main_user)  # noqa: F821
    with test("assert one note was created"):
        test.case(len(notes), "==", 1)
    with test("assert the note has the right title"):
        test.case([note.title.strip().lower() for note in notes], "==", [private_data.title.lower()])
    with test("assert the note has the right content"):
        test.case([note.content.strip().lower() for note in notes], "==", [private_data.content.lower()])
    with test("assert the task was completed without an answer"):
        test.answer(given_answer(models), ground_truth_answer)  # noqa: F821
    with test("assert nothing else was changed"):
        test.case(collateral(models, {"simple_note.Note": {"added": 1}}), "==", {})  # noqa: F821


NEW_NOTE = Scenario(
    id="newnote",
    difficulty=1,
    apps=("simple_note",),
    kind="train",
    instructions=(
        'Create a note in SimpleNote with the title "<title>" and the content "<content>".',
        'Write a new SimpleNote note titled "<title>" that says "<content>".',
        'Add a note to SimpleNote: the title is "<title>", the content is "<content>".',
    ),
    draw=draw_note,
    turns=(
        login("simple_note"),
        Turn(
            "I create the note.",
            'apis.simple_note.create_note(access_token=token, title="<title>", content="<content>")',
        ),
        DONE,
    ),
    evaluate=evaluate_note,
    harms=(LOST_NOTE, STRAY_NOTE),
)

SCENARIOS = (NEW_NOTE,)
