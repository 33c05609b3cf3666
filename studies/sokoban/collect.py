"""Collect the tables of the study in one file for docs/results; `run.sh` calls it.

    python studies/sokoban/collect.py RUNS/tables docs/results/sokoban.json

First come the methods after the largest budget, each from the table with most of its runs on bases of the shipped kind.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SHIPPED = ("main", "rows", "content")
"""The tables on bases of the shipped kind and the same levels, those with the most seeds first."""

KEYS = ("accuracy", "interval", "completion", "completion_interval", "greedy_accuracy", "greedy_interval")


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def collect(tables_folder: Path) -> dict[str, Any]:
    tables = {path.parent.name: json.loads(path.read_text()) for path in sorted(tables_folder.glob("*/table.json"))}
    methods: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for table in (tables[name] for name in SHIPPED if name in tables):
        last = table["budgets"][max(table["budgets"], key=int)]
        for name, row in last.items():
            figures = {key: row[key] for key in KEYS}
            methods.setdefault(name, {**figures, "runs": row["cells"], "seeds": row["seeds"], "models": row["models"],
                                      "episodes": row["episodes"]})  # fmt: skip
            if row.get("difference"):
                differences.setdefault(name, row["difference"])
    return rounded({**methods, "difference_to_grpo": differences, "tables": tables})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(json.dumps(collect(Path(sys.argv[1])), indent=1) + "\n")
