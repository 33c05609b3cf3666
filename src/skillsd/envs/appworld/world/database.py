"""Writes the world into AppWorld's databases, using the engine's models. Needs AppWorld's Python."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from appworld.apps import get_all_apps
from appworld.apps.api_lib import CompanyNotifier
from appworld.apps.model_lib import CachedDBHandler
from appworld.collections.models import ModelCollection
from appworld.common.datetime import DateTime

from .lives import World
from .people import APPS, Person

# The time of every episode; the engine freezes the clock at it.
NOW = datetime(2023, 5, 18, 12, 0, 0)


def ago(days: int, minutes: int = 0) -> DateTime:
    moment = NOW - timedelta(days=days, minutes=minutes)
    return DateTime(moment.year, moment.month, moment.day, moment.hour, moment.minute)


def write_base(world: World, folder: Path, api_docs: dict[str, dict[str, dict]]) -> None:
    """Create the databases with everything that the tasks share, and save them in ``folder``."""
    home = ":memory:base"
    models = ModelCollection.load(
        to_db_home_path=home, from_db_home_path=home, load_apps=get_all_apps(), create_db=True
    )
    _api_docs(models, api_docs)
    _accounts(models, world)
    _spotify(models, world)
    _venmo(models, world)
    _notes_and_files(models, world)
    _todoist(models, world)
    _gmail(models, world)
    _phone(models, world)
    models.save(str(folder), format="full", delete_if_exists=True)
    CachedDBHandler.reset()


def _save(model: Any, rows: Iterable[dict[str, Any]]) -> list[Any]:
    """Create one record per row in a single transaction. Returns the records, with ids."""
    records = [model.create(**row) for row in rows]
    model.save_all(records)
    return records


def _api_docs(models: Any, api_docs: dict[str, dict[str, dict]]) -> None:
    """Fill the table of the app through which the agent reads the API documentation."""
    model = models.api_docs.ApiDoc
    rows = []
    for docs in api_docs.values():
        for doc in docs.values():
            row = {**doc, "app_name_": doc["app_name"]}
            rows.append({key: value for key, value in row.items() if key in model.field_names()})
    _save(model, rows)


def _accounts(models: Any, world: World) -> None:
    for app in APPS:
        CompanyNotifier(app).create_accounts()
    people = list(world.people.values())
    main_users = _save(
        models.admin.MainUser,
        (
            {
                "first_name": person.first_name,
                "last_name": person.last_name,
                "email": person.email,
                "phone_number": person.phone_number,
                "birthday": person.birthday,
                "sex": person.sex,
            }
            for person in people
        ),
    )
    _save(
        models.admin.AccountPassword,
        (
            {"main_user_id": user.id, "account_name": app, "password": password}
            for user, person in zip(main_users, people, strict=True)
            for app, password in person.passwords.items()
        ),
    )
    for app in APPS:
        _save(models[app].User, (_user_row(models[app].User, app, person, world) for person in people))


def _user_row(user_model: Any, app: str, person: Person, world: World) -> dict[str, Any]:
    row = {
        "first_name": person.first_name,
        "last_name": person.last_name,
        "password": person.passwords[app],
        "created_at": ago(400),
        "last_logged_in": ago(3),
        "email": person.email,
        "phone_number": person.phone_number,
        "verified": True,
        "venmo_balance": world.lives[person.email].balance,
    }
    return {key: value for key, value in row.items() if key in user_model.field_names()}


def _ids(user_model: Any) -> dict[str, int]:
    """E-mail address -> account id in one app, for all people."""
    return {user.email: user.id for user in user_model.all()}


def _spotify(models: Any, world: World) -> None:
    spotify, users = models.spotify, _ids(models.spotify.User)
    genres = {song.artist: song.genre for song in world.songs.values()}
    artists = _save(
        spotify.Artist, ({"name": name, "genre": genre, "created_at": ago(900)} for name, genre in genres.items())
    )
    artist_ids = {artist.name: artist.id for artist in artists}
    songs = _save(
        spotify.Song,
        (
            {
                "title": song.title,
                "artist_ids": [artist_ids[song.artist]],
                "duration": song.duration,
                "genre": song.genre,
                "release_date": DateTime(song.release_year, 3, 1),
                "play_count": song.play_count,
            }
            for song in world.songs.values()
        ),
    )
    song_ids = {song.title: song.id for song in songs}
    _save(spotify.MusicPlayer, ({"user_id": user} for email, user in users.items() if email in world.lives))
    library, likes = [], []
    for email, life in world.lives.items():
        for index, title in enumerate(life.library):
            row = {"user_id": users[email], "song_id": song_ids[title], "created_at": ago(20, index)}
            library.append(row)
        for index, title in enumerate(life.liked):
            likes.append({"user_id": users[email], "song_id": song_ids[title], "liked_at": ago(30, index)})
    _save(spotify.UserLibrarySong, library)
    _save(spotify.SongLike, likes)


def _venmo(models: Any, world: World) -> None:
    venmo, users = models.venmo, _ids(models.venmo.User)
    _save(
        venmo.Friendship,
        (
            {"user_id": users[person.email], "friend_id": users[email], "created_at": ago(350)}
            for person in world.people.values()
            for email in person.contacts
        ),
    )
    _save(
        venmo.Transaction,
        (
            {
                "sender_id": users[payment.sender],
                "receiver_id": users[payment.receiver],
                "amount": payment.amount,
                "description": payment.note,
                "created_at": ago(payment.days_ago, index % 600),
                "updated_at": ago(payment.days_ago, index % 600),
            }
            for index, payment in enumerate(world.payments)
        ),
    )


def _notes_and_files(models: Any, world: World) -> None:
    note_users, file_users = _ids(models.simple_note.User), _ids(models.file_system.User)
    notes, folders, files = [], [], []
    for email, life in world.lives.items():
        for index, (title, content) in enumerate(life.notes.items()):
            times = {"created_at": ago(40 + index), "updated_at": ago(10 + index)}
            notes.append({"user_id": note_users[email], "title": title, "content": content, "pinned": False, **times})
        owner, home = {"user_id": file_users[email]}, f"/home/{world.people[email].first_name.lower()}/"
        times = {"created_at": ago(40), "updated_at": ago(40)}
        paths = ["/", "/home/", home, *(f"{home}{folder}/" for folder in life.folders)]
        folders += [{**owner, "path": path, **times} for path in paths]
        for folder, names in life.folders.items():
            files += [{**owner, "path": f"{home}{folder}/{name}", "content": name, **times} for name in names]
    _save(models.simple_note.Note, notes)
    _save(models.file_system.Directory, folders)
    _save(models.file_system.File, files)


def _todoist(models: Any, world: World) -> None:
    todoist, users = models.todoist, _ids(models.todoist.User)
    rows = []
    for email, life in world.lives.items():
        names = ["Inbox", *life.projects]
        rows += [{"user_id": users[email], "name": n, "is_inbox": n == "Inbox", "created_at": ago(90)} for n in names]
    projects = _save(todoist.Project, rows)
    _save(
        todoist.ProjectCollaboratorLink,
        ({"project_id": project.id, "user_id": project.user_id, "created_at": ago(90)} for project in projects),
    )
    project_ids = {(project.user_id, project.name): project.id for project in projects}
    _save(
        todoist.Task,
        (
            {
                "project_id": project_ids[users[email], name],
                "user_id": users[email],
                "title": todo.title,
                "priority": todo.priority,
                "is_completed": todo.done,
                "order_index": index,
                "created_at": ago(15, index),
            }
            for email, life in world.lives.items()
            for name, todos in life.projects.items()
            for index, todo in enumerate(todos)
        ),
    )


def _gmail(models: Any, world: World) -> None:
    """Each mail is its own thread, with one view for the sender and one for the receiver."""
    gmail, users = models.gmail, _ids(models.gmail.User)
    times = [ago(mail.days_ago, index % 600) for index, mail in enumerate(world.mails)]
    emails = _save(
        gmail.Email,
        (
            {
                "sender_id": users[mail.sender],
                "recipient_ids": [users[mail.receiver]],
                "subject": mail.subject,
                "body": mail.body,
                "created_at": time,
            }
            for mail, time in zip(world.mails, times, strict=True)
        ),
    )
    threads = _save(
        gmail.GlobalEmailThread,
        (
            {"email_ids": [email.id], "created_at": time, "updated_at": time}
            for email, time in zip(emails, times, strict=True)
        ),
    )
    views = []
    for mail, email, thread, time in zip(world.mails, emails, threads, times, strict=True):
        view = {
            "global_email_thread_id": thread.id,
            "email_ids": [email.id],
            "created_at": time,
            "updated_at": time,
        }
        views.append({**view, "user_id": users[mail.sender], "incoming": False, "outgoing": True, "read": True})
        mine = {"incoming": True, "outgoing": False, "read": mail.read, "starred": mail.starred}
        views.append({**view, "user_id": users[mail.receiver], **mine})
    _save(gmail.UserEmailThread, views)


def _phone(models: Any, world: World) -> None:
    by_number = {user.phone_number: user.id for user in models.phone.User.all()}
    rows = []
    for person in world.people.values():
        for index, (email, relationships) in enumerate(person.contacts.items()):
            other = world.people[email]
            row = {
                "user_id": by_number[person.phone_number],
                "first_name": other.first_name,
                "last_name": other.last_name,
                "email": email,
                "phone_number": other.phone_number,
                "birthday": other.birthday,
                "relationships": relationships,
                "created_at": ago(200, index),
            }
            rows.append(row)
    _save(models.phone.Contact, rows)
