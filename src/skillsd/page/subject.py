"""What a report is about: one run's folder, or a folder with many runs, as `skillsd table` and `skillsd demo` write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillsd.errors import UserError
from skillsd.files.read import read_json_object
from skillsd.runs.folder import CONFIG
from skillsd.runs.lifecycle import is_run
from skillsd.runs.opened import OpenRun, open_run

TABLE = "table.json"


@dataclass(frozen=True)
class LabelledRun:
    """A run with its labels in a table. A run on its own has those of its configuration.

    Attributes:
        method: the method's name, or a variant's label.
    """

    run: OpenRun
    model: str
    method: str
    seed: int


@dataclass(frozen=True)
class Subject:
    """The runs of a report.

    Attributes:
        table: content of ``table.json``; None for a single run, or if the table has not been written yet.
    """

    folder: Path
    is_table: bool
    runs: tuple[LabelledRun, ...]
    table: Mapping[str, Any] | None = None


def open_subject(folder: Path) -> Subject:
    """The run or the table in a folder.

    Raises:
        UserError: if it holds neither, or a file in it is damaged.
    """
    if is_run(folder):
        run = open_run(folder)
        label = LabelledRun(run, Path(run.config.model.name).name, run.config.method, run.config.seed)
        return Subject(folder, False, (label,))
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{str(folder)!r} {kind}: expected the folder of a run, or of a table")
    found = sorted(folder.glob(f"*/*/seed-*/{CONFIG}"))
    if not found:
        raise UserError(
            f"{str(folder)!r} is neither a run's folder (with {CONFIG}) nor a table's (with runs in "
            f"MODEL/METHOD/seed-N/)"
        )
    table = read_json_object(folder / TABLE, "make the table again") if (folder / TABLE).is_file() else None
    runs = [_labelled(path.parent) for path in found]
    order = _order(table)
    runs.sort(key=lambda r: (order.get(r.method, len(order)), r.method, r.model, r.seed))
    return Subject(folder, True, tuple(runs), table)


def _labelled(folder: Path) -> LabelledRun:
    run = open_run(folder)
    return LabelledRun(run, folder.parent.parent.name, folder.parent.name, run.config.seed)


def _order(table: Mapping[str, Any] | None) -> dict[str, int]:
    """Method -> its place in the table."""
    budgets = (table or {}).get("budgets") or {}
    return {method: place for rows in budgets.values() for place, method in enumerate(rows)}
