"""What a scenario is: a family of tasks that differ in supervisor, data and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from ..lives import World
from ..people import Person

# Which kind of answer a task wants: none, or the value that the turns bind to the name ``answer``.
FINISH = "apis.supervisor.complete_task()"
FINISH_WITH_ANSWER = "apis.supervisor.complete_task(answer=answer)"


@dataclass(frozen=True)
class Turn:
    """One step of the reference solution: a short sentence, then code. ``<name>`` stands for a parameter."""

    thought: str
    code: str


@dataclass(frozen=True)
class Draw:
    """What makes one task out of a scenario.

    ``parameters`` fill instruction and solution (the agent is told them); ``expected`` is what only the evaluation
    knows; ``answer`` is None where the task asks nothing.
    """

    parameters: dict[str, Any]
    expected: dict[str, Any]
    answer: Any = None


@dataclass(frozen=True)
class Scenario:
    """A family of tasks.

    ``kind`` says where its tasks go: "train" scenarios are split by instance over train, dev and test; "dev" and
    "test" scenarios are never trained on. ``evaluate`` is the source of the task's evaluation: it is copied, not
    called, from here. ``harms`` are pieces of code that spoil a right solution when run just before its last turn;
    ``verify.py`` demands that none of them succeeds.
    """

    id: str
    difficulty: int
    apps: tuple[str, ...]
    kind: str
    instructions: tuple[str, ...]
    draw: Callable[[World, Person, Random], Draw]
    turns: tuple[Turn, ...]
    evaluate: Callable[..., None]
    harms: tuple[str, ...]


def login(app: str, thought: str | None = None) -> Turn:
    """The first turn of every solution and the same everywhere but for the app: learnt once, used throughout."""
    username = "phone_number" if app == "phone" else "email"
    return Turn(
        thought or f"I log in to {app} with my supervisor's account.",
        "me = apis.supervisor.show_profile()\n"
        'passwords = {p["account_name"]: p["password"] for p in apis.supervisor.show_account_passwords()}\n'
        f'token = apis.{app}.login(username=me["{username}"], password=passwords["{app}"])["access_token"]',
    )


def relogin(app: str) -> Turn:
    """Into the second app of a task: supervisor and passwords are known by then."""
    username = "phone_number" if app == "phone" else "email"
    return Turn(
        f"Now I log in to {app}.",
        f'token = apis.{app}.login(username=me["{username}"], password=passwords["{app}"])["access_token"]',
    )


DONE = Turn("The task is done.", FINISH)
ANSWER = Turn("I have the answer.", FINISH_WITH_ANSWER)


def evaluate_question(test, public_data, private_data, main_user, models, ground_truth_answer):
    with test("assert the answer is right"):
        test.answer(given_answer(models), ground_truth_answer)  # noqa: F821
    with test("assert nothing was changed"):
        test.case(collateral(models, {}), "==", {})  # noqa: F821
