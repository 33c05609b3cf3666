"""The people of the world: their data, their relations, and the pools reserved for evaluation.

Relations stay within a pool, so neither the supervisor of an evaluation task nor any of their contacts occurs in a
training task.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

APPS = ("amazon", "file_system", "gmail", "phone", "simple_note", "splitwise", "spotify", "todoist", "venmo")

# First names must be unique: AppWorld names home directories after them.
_NAMES = {
    "train": (
        "Alma Brandt f, Boris Kellner m, Celia Moreno f, Dario Fenwick m, Edda Lindqvist f, Falko Reyes m, "
        "Greta Osborne f, Hanno Varga m, Ilka Thornton f, Jonas Abara m, Karin Delacroix f, Lorenz Pike m, "
        "Mira Castellan f, Niels Okafor m, Odile Hartman f, Pavel Sundberg m, Quirina Marsh f, Ruben Aldridge m"
    ),
    "dev": "Sanna Whitlock f, Tomas Ferreira m, Ursula Beck f, Viktor Lamont m, Wilma Ostrow f, Xaver Quill m",
    "test": "Yvonne Tarrant f, Zeno Halloran m, Astrid Colby f, Bruno Nakata m, Clara Winslow f, Didrik Monroe m",
}
_WORDS = ("maple", "harbor", "copper", "violet", "meadow", "lantern", "pepper", "granite", "saffron", "willow")


@dataclass
class Person:
    """One person. ``contacts`` maps the e-mail addresses of others to their relations to this person."""

    first_name: str
    last_name: str
    sex: str
    pool: str
    email: str
    phone_number: str
    birthday: str
    passwords: dict[str, str]
    contacts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.first_name} {self.last_name}"


def make_people() -> list[Person]:
    """All people with their relations, in a fixed order."""
    people = [_person(entry.strip(), pool) for pool, names in _NAMES.items() for entry in names.split(",")]
    for pool in _NAMES:
        _relate([person for person in people if person.pool == pool])
    return people


def _person(entry: str, pool: str) -> Person:
    first_name, last_name, sex = entry.split()
    rng = random.Random(f"person/{entry}")
    return Person(
        first_name=first_name,
        last_name=last_name,
        sex={"f": "female", "m": "male"}[sex],
        pool=pool,
        email=f"{first_name}.{last_name}@gmail.com".lower(),
        phone_number=str(rng.randrange(2_000_000_000, 9_999_999_999)),
        birthday=f"{rng.randrange(1955, 2001)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}",
        passwords={app: f"{rng.choice(_WORDS)}{rng.randrange(1000, 10000)}" for app in APPS},
    )


def _relate(pool: list[Person]) -> None:
    """Set the relations: pairs of roommates and of siblings, managers and employees, two friends each (two coworkers).

    Relations other than friend and coworker are unique, so that "my roommate" identifies one person.
    """
    size, half = len(pool), len(pool) // 2
    for index, person in enumerate(pool):
        neighbour = index + 1 if index % 2 == 0 else index - 1
        sibling = index - 1 if index % 2 == 0 else index + 1
        kin = pool[sibling % size]
        person.contacts[pool[neighbour].email] = ["roommate"]
        person.contacts[kin.email] = ["brother" if kin.sex == "male" else "sister"]
        person.contacts[pool[(index + half) % size].email] = ["manager" if index < half else "employee"]
        for step, relation in ((2, "friend"), (4, "coworker")):
            for other in (pool[(index + step) % size], pool[(index - step) % size]):
                person.contacts.setdefault(other.email, [relation])
