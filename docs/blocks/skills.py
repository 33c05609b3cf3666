"""Tables of the study of when a skill teaches, from docs/results/skills.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from blocks.common import percent, points, results, table


def arms(name: str) -> str:
    """Each arm of a table: accuracy, difference to GRPO, and the first and last reading of its teacher."""
    found = results("skills")[name]
    [rows] = found["budgets"].values()
    made = []
    for label, row in rows.items():
        each = [value for model in row["by_model"].values() for value in model["accuracy_by_seed"].values()]
        difference = (row.get("difference") or {}).get("accuracy")
        made.append(
            [
                f"`{label}`",
                row["cells"],
                f"{percent(row['accuracy'], row['interval'])}",
                f"{percent(min(each))} to {percent(max(each))}",
                points(difference["mean"], difference["interval"]) if difference else "-",
                _reading(found["curves"].get(label, {})),
            ]
        )
    columns = [
        "arm",
        "runs",
        "accuracy, % [95 %]",
        "lowest to highest run",
        "minus GRPO, points",
        "reading, % (first, last)",
    ]
    return table(columns, made)


def _reading(runs: Mapping[str, Any]) -> str:
    """Mean over the runs of the first and the last measurement."""
    measured = [run["reading"] for run in runs.values() if run["reading"]]
    if not measured:
        return "-"
    first, last = (sum(one[place][1] for one in measured) / len(measured) for place in (0, -1))
    return f"{100 * first:.0f}, {100 * last:.0f}"


RENDERERS: dict[str, Callable[[], str]] = {f"skills-{name}": partial(arms, name) for name in ("tuning", "main")}
