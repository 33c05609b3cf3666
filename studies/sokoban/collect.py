"""Puts the tables of the study (`skillsd table ... --out RUNS/NAME`) into one file for docs/results.

    python studies/sokoban/collect.py RUNS docs/results/sokoban.json

The figures of each method at the top are the main study's, after its largest budget.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MAIN = "main"


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def collect(runs: Path) -> dict[str, Any]:
    tables = {path.parent.name: json.loads(path.read_text()) for path in sorted(runs.glob("*/table.json"))}
    # The same runs counted on the paper's panel size: `--limit 64` of the same command, kept aside.
    for path in sorted(runs.glob("*/table-64.json")):
        tables[f"{path.parent.name}-64"] = json.loads(path.read_text())
    main = tables[MAIN]
    last = main["budgets"][max(main["budgets"], key=int)]
    keys = ("accuracy", "interval", "completion", "completion_interval", "greedy_accuracy", "greedy_interval")
    methods = {name: {**{k: row[k] for k in keys}, "seeds": row["seeds"], "models": row["models"], "runs": row["cells"],
                      "episodes": row["episodes"]} for name, row in last.items()}  # fmt: skip
    differences = {name: row["difference"] for name, row in last.items() if row.get("difference")}
    return rounded({**methods, "difference_to_grpo": differences, "studies": tables})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(json.dumps(collect(Path(sys.argv[1])), indent=1) + "\n")
