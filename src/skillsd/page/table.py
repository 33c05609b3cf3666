"""A table's figures, as ``table.json`` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skillsd.files.read import DamagedError
from skillsd.page.subject import TABLE, Subject
from skillsd.sweeps.show import notes


def table_view(subject: Subject) -> dict[str, Any] | None:
    """The table's rows by budget, its notes and what it was made with; None without a table."""
    if not subject.is_table:
        return None
    table = subject.table
    if table is None:
        return {"budgets": [], "missing": "There is no table.json yet: it is written when the table is complete."}
    try:
        return _view(table)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        path = subject.folder / TABLE
        raise DamagedError(path, f"is not a table ({type(error).__name__}: {error})", "make the table again") from error


def _view(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "split": table.get("split"),
        "tasks": table.get("tasks"),
        "unit": table.get("unit"),
        "against": table.get("against"),
        "command": table.get("command"),
        "notes": notes(table),
        "budgets": [
            {"episodes": int(budget), "rows": [{"method": name, **row} for name, row in rows.items()]}
            for budget, rows in table["budgets"].items()
        ],
    }
