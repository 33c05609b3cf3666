"""A failure to write is one error, and what was there before is unchanged."""

from __future__ import annotations

import errno
import io
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from skillsd.files.write import WriteFailedError, append, make_folder, replacing, write_whole, writing

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Files of this process can't grow beyond `size` bytes: the system's own error, as on a full disk."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_whole_file_or_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "before")
    with at_most(1000), pytest.raises(WriteFailedError, match="File too large") as error:
        write_whole(path, "x" * 2000)
    assert "MiB are free there" in str(error.value)
    assert "make room there, then run the same command again" in str(error.value)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_append_adds_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append(path, "x" * 800 + "\n")
    with at_most(1000), pytest.raises(WriteFailedError):
        append(path, "y" * 800 + "\n")
    assert path.read_text() == "x" * 800 + "\n"
    append(path, "z\n")
    assert path.read_text() == "x" * 800 + "\nz\n"


def test_a_device_that_is_full() -> None:
    if Path("/dev/full").exists():
        with pytest.raises(WriteFailedError, match="No space left on device"):
            write_whole(Path("/dev/full"), "a")


def test_folders_that_cant_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailedError, match=r"File exists\. What was there is unchanged: check the folder's rights"):
        make_folder(tmp_path / "file")
    with pytest.raises(WriteFailedError, match="Not a directory"):
        write_whole(tmp_path / "file" / "a", "")


def test_a_librarys_own_exception_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors, torch and tokenizers raise exceptions of their own for a full disk."""
    with pytest.raises(WriteFailedError, match="iostream error"), replacing(tmp_path / "a", by_library=True):
        raise RuntimeError("basic_ios::clear: iostream error")
    with pytest.raises(RuntimeError), writing(tmp_path / "a"):
        raise RuntimeError("another fault")

    class FullFile(io.BytesIO):
        def write(self, data: Any) -> int:
            raise FULL

    real = open
    monkeypatch.setattr(
        "builtins.open", lambda f, *args, **more: FullFile() if "probe" in str(f) else real(f, *args, **more)
    )
    with pytest.raises(WriteFailedError, match="No space left on device"), writing(tmp_path / "a", by_library=True):
        raise RuntimeError("basic_ios::clear: iostream error")
