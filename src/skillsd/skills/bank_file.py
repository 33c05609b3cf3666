"""The SQLite file of a skill bank: opening and checking it, copying it, and one clear error for all that can fail."""

from __future__ import annotations

import errno
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skillsd.errors import UserError
from skillsd.files.read import DamagedError
from skillsd.files.write import WriteFailedError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x534B5344  # "SKSD" in the file's header marks an SQLite file as a skill bank

WAIT_SECONDS = 60.0
"""How long a call waits for another process that reads or writes the file."""

_SCHEMA = """
CREATE TABLE skills (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused, so it is also the order of creation
    env TEXT NOT NULL,
    task TEXT NOT NULL,
    success_analysis TEXT NOT NULL,
    mistake_analysis TEXT NOT NULL,
    golden_workflow TEXT NOT NULL,
    source TEXT NOT NULL,
    iteration INTEGER NOT NULL,
    source_reward REAL NOT NULL,
    source_outcome TEXT NOT NULL,
    picks INTEGER NOT NULL DEFAULT 0,
    credited INTEGER NOT NULL DEFAULT 0,
    reward_sum REAL NOT NULL DEFAULT 0,
    UNIQUE (env, task, success_analysis, mistake_analysis, golden_workflow)
)
"""
_REMEDY = "give another path, or move that file away"
RESTORE = "restore it from a checkpoint's skills.sqlite, or move it away"
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_UNWRITABLE = (
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH),
)


@contextmanager
def guarded(path: str) -> Iterator[None]:
    """Turn SQLite's errors inside the block into one of ours. Errors of the calling code are left as they are.

    Raises:
        UserError: if another process has locked the file for longer than `WAIT_SECONDS`.
        WriteFailedError: if it can't be written, e.g. on a full disk.
        DamagedError: if it is damaged.
    """
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
        raise
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the details of SQLite's extended codes
        if code in _LOCKED:
            raise _locked(path) from error
        if code in _UNWRITABLE:
            full = errno.ENOSPC if code == sqlite3.SQLITE_FULL else None
            raise WriteFailedError(Path(path), str(error), full) from error
        if code == sqlite3.SQLITE_NOTADB:
            raise DamagedError(Path(path), "is not a database, so not a skill bank", _REMEDY) from error
        raise DamagedError(Path(path), f"is damaged ({error})", RESTORE) from error


def _locked(path: str) -> UserError:
    return UserError(
        f"another process has locked the skill bank {path!r} for {WAIT_SECONDS:g} s: close it there (an open "
        "transaction is enough, e.g. in a database viewer), then run the same command again"
    )


def check_header(path: Path) -> None:
    """Raise DamagedError for a file that is not SQLite's. (SQLite itself would overwrite a very short one.)"""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            header = file.read(16)
    except OSError as error:
        raise UserError(f"cannot open the skill bank {str(path)!r}: {error.strerror}. {_REMEDY}") from error
    if header not in (b"", b"SQLite format 3\0"):
        raise DamagedError(path, "is not a database, so not a skill bank", _REMEDY)


def connect(path: str, *, uri: bool = False) -> sqlite3.Connection:
    """Open the file. Transactions are started by `Bank.batch`."""
    try:
        return sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None, uri=uri)
    except sqlite3.OperationalError as error:
        raise UserError(f"cannot open the skill bank {path!r}: {error}. Does its folder exist?") from error


def prepare(db: sqlite3.Connection, path: str) -> None:
    """Create the table of a new bank, or check an existing one."""
    with guarded(path):
        if db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:
            db.execute("BEGIN IMMEDIATE")
            db.execute(_SCHEMA)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            db.execute("COMMIT")
    check(db, path)


def check(db: sqlite3.Connection, path: str) -> None:
    """Raise UserError unless `db` is a skill bank of this version, undamaged."""
    with guarded(path):
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        state = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if application != APPLICATION_ID:
        raise DamagedError(Path(path), "is an SQLite file, but not a skill bank", _REMEDY)
    if version != SCHEMA_VERSION:
        raise UserError(
            f"the skill bank {path!r} has schema version {version}, this skillsd reads {SCHEMA_VERSION}: use the "
            "skillsd that wrote it, or start with a new bank"
        )
    if state != "ok":
        raise DamagedError(Path(path), f"is damaged ({state})", RESTORE)


def copy(source: sqlite3.Connection, target: sqlite3.Connection, path: str) -> None:
    """Copy a bank's whole content; `path` is the one that may be locked. On an error `target` is unchanged."""
    end = time.monotonic() + WAIT_SECONDS

    def progress(status: int, remaining: int, total: int) -> None:
        if status in _LOCKED and time.monotonic() >= end:  # SQLite itself would try for ever
            raise _locked(path)

    with guarded(path):
        source.backup(target, progress=progress)
