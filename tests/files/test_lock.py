"""Locks: one process at a time, named to the others, and released however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from skillsd.errors import UserError
from skillsd.files.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from skillsd.files.lock import locked
with locked(Path(sys.argv[1]), "the run", "wait") as file:
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path: Path, script: str = HOLD) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = holder(path)
    try:
        with pytest.raises(UserError) as error, locked(path, "the run", "wait"):
            pass
        assert re.match(rf"process {process.pid} on .* is using the run: wait", str(error.value))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with locked(path, "the run", "wait"):  # released by the system
        pass
    assert not path.exists()


def test_this_process_itself(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, "the run", "wait"), pytest.raises(UserError, match="this process itself"):  # noqa: SIM117
        with locked(path, "the run", "wait"):
            pass
    with locked(tmp_path / ".lock", "the run", "wait"):
        pass


def test_a_forked_child_does_not_hold_it(tmp_path: Path) -> None:
    """Data loaders and environments fork; they may outlive a run that was killed."""
    forks = HOLD.replace('    print("held"', '    import os; child = os.fork()\n    child and print("held"')
    process = holder(tmp_path / ".lock", forks)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(100):  # the child lets go when it gets to run
        with suppress(UserError), locked(tmp_path / ".lock", "the run", "wait"):
            return
        time.sleep(0.1)
    pytest.fail("the child holds the lock")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_an_unreadable_holder_is_another_process(content: str, tmp_path: Path) -> None:
    process = holder(tmp_path / ".lock")
    (tmp_path / ".lock").write_text(content)
    try:
        with pytest.raises(UserError, match="another process is using"), locked(tmp_path / ".lock", "the run", "wait"):
            pass
    finally:
        process.kill()
        process.wait()
