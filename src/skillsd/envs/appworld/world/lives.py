"""The people's data in the apps, generated from fixed seeds: the content of the base databases.

Kept as plain data on purpose: ground truth is computed from it, independently of the API calls in the reference
solution. So a successful solution verifies both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from . import texts
from .people import Person, make_people


@dataclass
class Song:
    title: str
    artist: str
    genre: str
    duration: int  # seconds
    release_year: int
    play_count: int


@dataclass
class Todo:
    title: str
    priority: str
    done: bool


@dataclass
class Payment:
    sender: str  # e-mail address
    receiver: str
    amount: int  # dollars
    note: str
    days_ago: int


@dataclass
class Mail:
    sender: str
    receiver: str
    subject: str
    body: str
    read: bool
    starred: bool
    days_ago: int


@dataclass
class Life:
    """One person's data: songs by title, notes as title -> content, files as folder -> names."""

    library: list[str] = field(default_factory=list)
    liked: list[str] = field(default_factory=list)
    balance: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    debts: dict[str, tuple[str, int]] = field(default_factory=dict)  # note title -> (e-mail of the debtor, dollars)
    facts: list[str] = field(default_factory=list)  # titles of notes that state a fact
    projects: dict[str, list[Todo]] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class World:
    people: dict[str, Person]  # by e-mail address
    lives: dict[str, Life]
    songs: dict[str, Song]
    payments: list[Payment]
    mails: list[Mail]

    def pool(self, name: str) -> list[Person]:
        return [person for person in self.people.values() if person.pool == name]


def make_world() -> World:
    """Generate the world; deterministic."""
    people = {person.email: person for person in make_people()}
    songs = _songs()
    lives = {email: _life(person, people, songs) for email, person in people.items()}
    return World(people, lives, songs, _payments(people), _mails(people))


def _songs() -> dict[str, Song]:
    """Six songs per artist, with two-word titles."""
    rng = random.Random("songs")
    titles = [f"{first} {second}" for first in texts.SONG_FIRST for second in texts.SONG_SECOND]
    rng.shuffle(titles)
    songs = {}
    for artist, genre in (item for artists in texts.ARTISTS.values() for item in artists.items()):
        for _ in range(6):
            title = titles.pop()
            year, plays = rng.randrange(1990, 2023), rng.randrange(50, 900)
            songs[title] = Song(title, artist, genre, rng.randrange(120, 360), year, plays)
    return songs


def _life(person: Person, people: dict[str, Person], songs: dict[str, Song]) -> Life:
    rng = random.Random(f"life/{person.email}")
    life = Life(balance=rng.randrange(120, 900))
    for artist in rng.sample(list(texts.ARTISTS[person.pool]), 5):
        by_artist = [song.title for song in songs.values() if song.artist == artist]
        life.library += rng.sample(by_artist, rng.randrange(1, 5))
    rng.shuffle(life.library)
    # Liked songs are not in the library, so tasks that like library songs never find one already liked.
    life.liked = rng.sample(sorted(set(songs) - set(life.library)), rng.randrange(2, 6))

    for title in rng.sample(list(texts.FACTS[person.pool]), 4):
        fact = texts.FACTS[person.pool][title].format(n=rng.randrange(100, 1000), d=rng.randrange(1, 10))
        life.notes[title] = fact
        life.facts.append(title)
    events = rng.sample(texts.EVENTS[person.pool], 3)
    for event, email in zip(events, rng.sample(list(person.contacts), 3), strict=True):
        dollars = rng.randrange(11, 90)
        life.notes[event] = f"Share for {people[email].name}: ${dollars}"
        life.debts[event] = (email, dollars)
    for title in rng.sample(list(texts.OTHER_NOTES), 2):
        life.notes[title] = texts.OTHER_NOTES[title]

    todos, folders = texts.TODOS[person.pool], texts.FOLDERS[person.pool]
    for project in rng.sample(list(todos), 3):
        titles = rng.sample(todos[project], rng.randrange(5, 8))
        # Two to four tasks are open with high priority; the others vary.
        urgent = set(rng.sample(titles, rng.randrange(2, 5)))
        life.projects[project] = [
            Todo(title, "high", False)
            if title in urgent
            else Todo(title, rng.choice(("medium", "low")), rng.random() < 0.3)
            for title in titles
        ]
    for folder in rng.sample(list(folders), 3):
        names = rng.sample(folders[folder], rng.randrange(2, 9))
        life.folders[folder] = [f"{name}.{texts.FILE_ENDINGS[folder]}" for name in names]
    return life


def _payments(people: dict[str, Person]) -> list[Payment]:
    """Payments between contacts; enough that each person's fill more than one page of 20."""
    rng = random.Random("payments")
    payments = []
    for person in people.values():
        per_contact = 30 // len(person.contacts)
        for email in person.contacts:
            for _ in range(rng.randrange(per_contact - 1, per_contact + 2)):
                amount, note = rng.randrange(3, 60), rng.choice(texts.PAYMENT_NOTES[person.pool])
                payments.append(Payment(person.email, email, amount, note, rng.randrange(2, 300)))
    return sorted(payments, key=lambda payment: -payment.days_ago)


def _mails(people: dict[str, Person]) -> list[Mail]:
    """Mails to each person from three contacts: two to four unread threads from each, and one or two read ones."""
    rng = random.Random("mails")
    mails = []
    for person in people.values():
        for sender in rng.sample(list(person.contacts), 3):
            unread, read = rng.randrange(2, 5), rng.randrange(1, 3)
            for index, subject in enumerate(rng.sample(texts.MAIL_SUBJECTS, unread + read)):
                body = rng.choice(texts.MAIL_BODIES)
                starred = index % 4 == 3
                mails.append(Mail(sender, person.email, subject, body, index >= unread, starred, rng.randrange(2, 60)))
    return sorted(mails, key=lambda mail: -mail.days_ago)
