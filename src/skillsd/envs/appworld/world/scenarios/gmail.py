"""Tasks in Gmail."""

from __future__ import annotations

from random import Random

from ..lives import Mail, World
from ..people import Person
from .base import DONE, Draw, Scenario, Turn, login

LOST_THREAD = """threads = apis.gmail.show_inbox_threads(access_token=token)
apis.gmail.delete_thread(email_thread_id=threads[0]["email_thread_id"], access_token=token)"""
STRAY_READ = """threads = apis.gmail.show_inbox_threads(access_token=token, read=False)
apis.gmail.mark_thread_read(email_thread_id=threads[0]["email_thread_id"], access_token=token)"""
STRAY_STAR = """threads = apis.gmail.show_inbox_threads(access_token=token, starred=False)
apis.gmail.mark_thread_starred(email_thread_id=threads[0]["email_thread_id"], access_token=token)"""


def _draw_sender(world: World, person: Person, rng: Random) -> tuple[str, list[Mail]]:
    mails = [mail for mail in world.mails if mail.receiver == person.email]
    sender = rng.choice(sorted({mail.sender for mail in mails}))
    return sender, [mail for mail in mails if mail.sender == sender]


def draw_unread(world: World, person: Person, rng: Random) -> Draw:
    sender, mails = _draw_sender(world, person, rng)
    return Draw({"sender": sender}, {"sender": sender, "subjects": [mail.subject for mail in mails if not mail.read]})


def evaluate_read(test, public_data, private_data, main_user, models, ground_truth_answer):
    subjects = set(private_data.subjects)
    threads = of_user(updated(models, "gmail.UserEmailThread"), "user", main_user)  # noqa: F821
    threads = [t for t in threads if t.read and t.sender_email_addresses == [private_data.sender]]
    read = {email.subject for thread in threads for email in thread.emails}
    with test("assert one of the threads was marked as read"):
        test.case(len(read & subjects), ">=", 1)
    with test("assert all of the threads were marked as read"):
        test.case(subjects - read, "==", set())
    with test("assert the task was completed without an answer"):
        test.answer(given_answer(models), ground_truth_answer)  # noqa: F821
    with test("assert nothing else was changed"):
        allowed = {"updated": len(subjects), "fields": ["read"]}
        test.case(collateral(models, {"gmail.UserEmailThread": allowed}), "==", {})  # noqa: F821


READ_MAIL = Scenario(
    id="readmail",
    difficulty=2,
    apps=("gmail",),
    kind="train",
    instructions=(
        "Mark all unread threads from <sender> in my Gmail inbox as read.",
        "Mark every unread thread of <sender> in the inbox of my Gmail as read.",
        "In my Gmail inbox, mark the unread threads that <sender> sent me as read.",
    ),
    draw=draw_unread,
    turns=(
        login("gmail"),
        Turn(
            "I list the unread threads from this sender.",
            'threads = apis.gmail.show_inbox_threads(access_token=token, from_email="<sender>", read=False, '
            "page_limit=20)\nprint(len(threads))",
        ),
        Turn(
            "I mark each of them as read.",
            "for thread in threads:\n    apis.gmail.mark_thread_read(access_token=token, "
            'email_thread_id=thread["email_thread_id"])',
        ),
        DONE,
    ),
    evaluate=evaluate_read,
    harms=(STRAY_READ, LOST_THREAD),
)


def draw_unstarred(world: World, person: Person, rng: Random) -> Draw:
    sender, mails = _draw_sender(world, person, rng)
    return Draw({"sender": sender}, {"sender": sender, "subjects": [m.subject for m in mails if not m.starred]})


def evaluate_star(test, public_data, private_data, main_user, models, ground_truth_answer):
    subjects = set(private_data.subjects)
    threads = of_user(updated(models, "gmail.UserEmailThread"), "user", main_user)  # noqa: F821
    threads = [t for t in threads if t.starred and t.sender_email_addresses == [private_data.sender]]
    starred = {email.subject for thread in threads for email in thread.emails}
    with test("assert one of the threads was starred"):
        test.case(len(starred & subjects), ">=", 1)
    with test("assert all of the threads were starred"):
        test.case(subjects - starred, "==", set())
    with test("assert the task was completed without an answer"):
        test.answer(given_answer(models), ground_truth_answer)  # noqa: F821
    with test("assert nothing else was changed"):
        allowed = {"updated": len(subjects), "fields": ["starred"]}
        test.case(collateral(models, {"gmail.UserEmailThread": allowed}), "==", {})  # noqa: F821


STAR_MAIL = Scenario(
    id="starmail",
    difficulty=2,
    apps=("gmail",),
    kind="test",
    instructions=(
        "Star all threads from <sender> in my Gmail inbox that are not starred yet.",
        "Mark every unstarred thread of <sender> in the inbox of my Gmail as starred.",
        "In my Gmail inbox, star the threads that <sender> sent me, except those that are starred already.",
    ),
    draw=draw_unstarred,
    turns=(
        login("gmail"),
        Turn(
            "I list the unstarred threads from this sender.",
            'threads = apis.gmail.show_inbox_threads(access_token=token, from_email="<sender>", starred=False, '
            "page_limit=20)\nprint(len(threads))",
        ),
        Turn(
            "I star each of them.",
            "for thread in threads:\n    apis.gmail.mark_thread_starred(access_token=token, "
            'email_thread_id=thread["email_thread_id"])',
        ),
        DONE,
    ),
    evaluate=evaluate_star,
    harms=(STRAY_STAR, LOST_THREAD),
)

SCENARIOS = (READ_MAIL, STAR_MAIL)
