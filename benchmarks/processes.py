"""Memory and CPU time of processes and their descendants."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def _family(roots: list[int]) -> Iterator[int]:
    """These processes and all their descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    todo = list(roots)
    while todo:
        pid = todo.pop()
        todo += parents.get(pid, [])
        yield pid


def memory_mib(roots: list[int]) -> float:
    """Proportional memory (PSS: shared pages are counted once) of these processes and all their descendants, in MiB."""
    found = 0.0
    for pid in _family(roots):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            found += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024
    return found


def cpu_seconds(roots: list[int]) -> float:
    """CPU time so far of these processes and all their descendants that run now."""
    ticks = 0
    for pid in _family(roots):
        with contextlib.suppress(OSError, IndexError, ValueError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")
