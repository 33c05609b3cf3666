"""Memory of processes and their descendants."""

from __future__ import annotations

import contextlib
from pathlib import Path


def memory_mib(roots: list[int]) -> float:
    """Proportional memory (PSS: shared pages are counted once) of these processes and all their descendants, in MiB."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, todo = 0.0, list(roots)
    while todo:
        pid = todo.pop()
        todo += parents.get(pid, [])
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            found += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024
    return found
