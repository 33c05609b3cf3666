"""Tasks that use data from one app to act in another."""

from __future__ import annotations

from random import Random

from .. import texts
from ..lives import World
from ..people import Person
from .base import DONE, Draw, Scenario, Turn, login, relogin
from .phone import LOST_CONTACT, STRAY_TEXT, draw_relation, evaluate_text
from .venmo import STRAY_FRIEND, STRAY_PAYMENT, evaluate_payment

FIND_NOTE = Turn(
    "I read the note.",
    'notes = apis.simple_note.search_notes(access_token=token, query="<title>")\n'
    'content = apis.simple_note.show_note(access_token=token, note_id=notes[0]["note_id"])["content"]\n'
    "print(content)",
)


def draw_fact(world: World, person: Person, rng: Random) -> Draw:
    relation, other = draw_relation(world, person, rng)
    life = world.lives[person.email]
    title = rng.choice(life.facts)
    return Draw({"relation": relation, "title": title}, {"number": other.phone_number, "message": life.notes[title]})


TEXT_NOTE = Scenario(
    id="textnote",
    difficulty=3,
    apps=("simple_note", "phone"),
    kind="train",
    instructions=(
        'Text my <relation> the content of my SimpleNote note "<title>".',
        'Send my <relation> a text message with what my note "<title>" in SimpleNote says.',
        'My <relation> needs to know what is in my SimpleNote note "<title>". Send its content as a text message.',
    ),
    draw=draw_fact,
    turns=(
        login("simple_note"),
        FIND_NOTE,
        relogin("phone"),
        Turn(
            "I look up the number and send the message.",
            'contacts = apis.phone.search_contacts(access_token=token, relationship="<relation>")\n'
            'number = contacts[0]["phone_number"]\n'
            "apis.phone.send_text_message(access_token=token, phone_number=number, message=content)",
        ),
        DONE,
    ),
    evaluate=evaluate_text,
    harms=(STRAY_TEXT, LOST_CONTACT),
)


def draw_debt(world: World, person: Person, rng: Random) -> Draw:
    debts = world.lives[person.email].debts
    title = rng.choice(sorted(debts))
    email, dollars = debts[title]
    return Draw(
        {"title": title, "name": world.people[email].name},
        {"email": email, "amount": dollars, "note": title.lower()},
    )


def evaluate_request(test, public_data, private_data, main_user, models, ground_truth_answer):
    requests = of_user(added(models, "venmo.PaymentRequest"), "sender", main_user)  # noqa: F821
    with test("assert one payment request was made"):
        test.case(len(requests), "==", 1)
    with test("assert the request went to the right person"):
        test.case([r.receiver.email for r in requests], "==", [private_data.email])
    with test("assert the request has the right amount"):
        test.case([r.amount for r in requests], "==", [private_data.amount])
    with test("assert the request has the right note"):
        test.case([r.description.strip().lower() for r in requests], "==", [private_data.note])
    with test("assert the task was completed without an answer"):
        test.answer(given_answer(models), ground_truth_answer)  # noqa: F821
    with test("assert nothing else was changed"):
        allowed = {"venmo.PaymentRequest": {"added": 1}, "venmo.Notification": {"added": 1}}
        test.case(collateral(models, allowed), "==", {})  # noqa: F821


REQUEST_DEBT = Scenario(
    id="requestdebt",
    difficulty=3,
    apps=("simple_note", "venmo"),
    kind="train",
    instructions=(
        'My SimpleNote note "<title>" says how much <name> owes me. '
        'Request that amount on Venmo with the note "<title>".',
        'Look up the share of <name> in my SimpleNote note "<title>" and request it from <name> on Venmo. '
        'The note of the request should be "<title>".',
        'Request the money that <name> owes me according to my note "<title>" in SimpleNote. '
        'Do it on Venmo with the note "<title>".',
    ),
    draw=draw_debt,
    turns=(
        login("simple_note"),
        FIND_NOTE,
        relogin("venmo"),
        Turn(
            "I request the amount after the dollar sign.",
            'friends = apis.venmo.search_friends(access_token=token, query="<name>")\n'
            'email = friends[0]["email"]\n'
            'amount = int(content.split("$")[1])\n'
            "apis.venmo.create_payment_request(access_token=token, user_email=email, amount=amount, "
            'description="<title>")',
        ),
        DONE,
    ),
    evaluate=evaluate_request,
    harms=(STRAY_PAYMENT, STRAY_FRIEND),
)


def draw_payment(world: World, person: Person, rng: Random) -> Draw:
    relation, other = draw_relation(world, person, rng)
    amount, note = rng.randrange(5, 60), rng.choice(texts.PAYMENT_NOTES[person.pool])
    return Draw(
        {"relation": relation, "amount": amount, "note": note},
        {"email": other.email, "amount": amount, "note": note},
    )


PAY_CONTACT = Scenario(
    id="paycontact",
    difficulty=3,
    apps=("phone", "venmo"),
    kind="dev",
    instructions=(
        'Send $<amount> to my <relation> on Venmo with the note "<note>". Who that is, you find in my phone contacts.',
        'Pay my <relation> $<amount> on Venmo and write "<note>" as the note. My phone contacts say who my '
        "<relation> is.",
        'Look up my <relation> in the contacts of my phone, then send them $<amount> on Venmo with the note "<note>".',
    ),
    draw=draw_payment,
    turns=(
        login("phone"),
        Turn(
            "I look up the e-mail address.",
            'contacts = apis.phone.search_contacts(access_token=token, relationship="<relation>")\n'
            'email = contacts[0]["email"]\nprint(email)',
        ),
        relogin("venmo"),
        Turn(
            "I send the money.",
            "apis.venmo.create_transaction(access_token=token, receiver_email=email, amount=<amount>, "
            'description="<note>")',
        ),
        DONE,
    ),
    evaluate=evaluate_payment,
    harms=(STRAY_PAYMENT, STRAY_FRIEND),
)

SCENARIOS = (TEXT_NOTE, REQUEST_DEBT, PAY_CONTACT)
