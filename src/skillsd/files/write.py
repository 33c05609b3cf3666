"""Write files so that a failure (a full disk, a limit, missing rights) is one clear error and damages nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from skillsd.errors import EngineFailedError, UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PROBE = b"\0" * (1 << 16)


class WriteFailedError(UserError):
    """A file could not be written. What was there before is unchanged.

    Attributes:
        path: the file or folder.
        problem: what failed.
        remedy: what to do about it.
    """

    def __init__(self, path: Path, reason: str, code: int | None = None) -> None:
        self.path = path
        self.problem = f"can't write {str(path)!r}: {reason}"
        self.remedy = "make room there" if code in _FULL else "check the folder's rights, or give another one"
        super().__init__(f"{self.problem}. What was there is unchanged: {self.remedy}, then run the same command again")


@contextmanager
def writing(path: Path, *, by_library: bool = False) -> Iterator[None]:
    """Turn a failure to write `path` inside the block into a `WriteFailedError`.

    Args:
        by_library: the block only writes, with a library that has exceptions of its own (torch, safetensors,
            tokenizers): whatever it raises is a failure to write.
    """
    try:
        yield
    except (UserError, EngineFailedError):
        raise
    except OSError as error:
        _fail(path, error)
    except Exception as error:
        if not by_library or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        try:
            _probe(path)
        except OSError as reason:
            _fail(path, reason)
        text = " ".join(str(error).split()) or type(error).__name__
        raise WriteFailedError(path, f"{text:.300} ({_free(path)})", errno.ENOSPC) from error


@contextmanager
def replacing(path: Path, *, by_library: bool = False) -> Iterator[Path]:
    """Write a file under another name, and rename it once it is complete and on the disk.

    Yields:
        The path to write to. If the block fails, it is removed, and `path` is unchanged.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with writing(path, by_library=by_library):
            yield aside
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically. Non-regular files (e.g. /dev/stdout) are written directly."""
    if path.exists() and not path.is_file():
        with writing(path):
            path.write_text(text, encoding="utf-8")
        return
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def append(path: Path, text: str) -> None:
    """Append a text: all of it, or nothing."""
    left = memoryview(text.encode())
    with writing(path), open(path, "ab", buffering=0) as file:  # a buffer would be written again by `truncate`
        end = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def make_folder(path: Path) -> None:
    """Create a folder and its parents."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def _fail(path: Path, error: OSError) -> NoReturn:
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    free = f" ({_free(path)})" if error.errno in _FULL else ""
    raise WriteFailedError(path, f"{reason}{free}", error.errno) from error


def _probe(path: Path) -> None:
    """Raise OSError if the file system takes no more data."""
    probe = _folder(path) / ".probe.partial"
    try:
        with open(probe, "wb", buffering=0) as file:
            file.write(_PROBE)
            os.fsync(file.fileno())
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(_folder(path)).free / (1 << 20):.1f} MiB are free there"
    except OSError:
        return "no free space is known"


def _folder(path: Path) -> Path:
    """The nearest folder that exists."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path())
