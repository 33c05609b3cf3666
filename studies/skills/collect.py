"""Collect the study's tables in one file for docs/results; `run.sh` calls it.

    python studies/skills/collect.py RUNS docs/results/skills.json

Of each table: the rows with their differences, and how reading went on in each run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROW = ("cells", "accuracy", "interval", "greedy_accuracy", "episodes", "difference", "by_model")


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def curves(folder: Path) -> dict[str, Any]:
    """method -> base/seed -> [episodes, accuracy on the tuning tasks], [iteration, reading]."""
    found: dict[str, Any] = {}
    for run in sorted(folder.glob("*/*/seed-*/")):
        base, method, seed = run.relative_to(folder).parts
        metrics = records(run / "metrics.jsonl")
        found.setdefault(method, {})[f"{base}/{seed}"] = {
            "accuracy": [[r["episodes"], r["eval/accuracy"]] for r in records(run / "evaluations.jsonl")],
            "reading": [[r["iteration"], r["reading/gap"]] for r in metrics if "reading/gap" in r],
            "first_picks": metrics[-1].get("skills/first_picks") if metrics else None,
        }
    return found


def collect(runs: Path) -> dict[str, Any]:
    tables = {}
    for path in sorted(runs.glob("*/table.json")):
        table = json.loads(path.read_text())
        kept = ("split", "tasks", "samples", "seeds", "models", "command", "versions", "processor", "made_with")
        budgets = {
            budget: {name: {key: row.get(key) for key in ROW} for name, row in rows.items()}
            for budget, rows in table["budgets"].items()
        }
        tables[path.parent.name] = {
            **{key: table.get(key) for key in kept},
            "budgets": budgets,
            "curves": curves(path.parent),
        }
    return rounded(tables)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(json.dumps(collect(Path(sys.argv[1])), indent=1) + "\n")
