"""Scenarios: families of tasks that differ in supervisor, data and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from ..lives import World
from ..people import Person

# Completing a task without an answer, or with the value of the variable ``answer``.
FINISH = "apis.supervisor.complete_task()"
FINISH_WITH_ANSWER = "apis.supervisor.complete_task(answer=answer)"


@dataclass(frozen=True)
class Turn:
    """One turn of the reference solution: a short sentence and code. ``<name>`` is replaced by a parameter."""

    thought: str
    code: str


@dataclass(frozen=True)
class Draw:
    """The data that turn a scenario into a task.

    ``parameters`` are inserted into the instruction and the solution; ``expected`` is used by the evaluation only;
    ``answer`` is None if the task asks for none.
    """

    parameters: dict[str, Any]
    expected: dict[str, Any]
    answer: Any = None


@dataclass(frozen=True)
class Scenario:
    """A family of tasks.

    ``kind`` determines the splits: instances of "train" scenarios are divided among train, dev and test; "dev" and
    "test" scenarios are never used for training. ``evaluate`` is the source of the task's evaluation: it is copied, not
    called. ``harms`` are code snippets with a side effect that makes a correct solution fail when run just before its
    last turn; ``verify.py`` checks this.
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
    """The first turn of every solution. The same everywhere except for the app, so that it is easy to learn."""
    username = "phone_number" if app == "phone" else "email"
    return Turn(
        thought or f"I log in to {app} with my supervisor's account.",
        "me = apis.supervisor.show_profile()\n"
        'passwords = {p["account_name"]: p["password"] for p in apis.supervisor.show_account_passwords()}\n'
        f'token = apis.{app}.login(username=me["{username}"], password=passwords["{app}"])["access_token"]',
    )


def relogin(app: str) -> Turn:
    """Log in to the second app of a task, reusing the profile and passwords from `login`."""
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
