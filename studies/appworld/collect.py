"""Put what studies/appworld/run.sh measured into one JSON file: ``collect.py RUNS OUT``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from skillsd.envs.appworld import client, paths
from skillsd.report.manifest import commit, processor, versions


BASE = Path("models/appworld-smoke-base")


def tasks(root: Path) -> dict[str, Any]:
    """Tasks by split, and in each by scenario's apps and difficulty."""
    world = json.loads((root / "data" / "skillsd.json").read_text(encoding="utf-8"))
    found = {}
    for split, ids in world["splits"].items():
        known = [world["tasks"][task_id] for task_id in ids]
        found[split] = {
            "tasks": len(ids),
            "scenarios": len({task["scenario"] for task in known}),
            "by_app": dict(Counter(app for task in known for app in task["apps"])),
            "by_difficulty": dict(Counter(str(task["difficulty"]) for task in known)),
        }
    return {"version": world["version"], "splits": found}


def attacks(report: Path) -> dict[str, str]:
    """Each test of an attack: stopped where it passed, open where it failed, not tried where it was skipped."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"].removeprefix("test_").replace("_", " ")
        kinds = {child.tag for child in case}
        found[name] = "not tried" if "skipped" in kinds else "open" if kinds & {"failure", "error"} else "stopped"
    return found


def main() -> None:
    runs, out = Path(sys.argv[1]), Path(sys.argv[2])
    speed = Path("benchmarks/results/appworld.json")
    table = runs / "table-appworld-smoke" / "table.json"
    for path in (table, speed, runs / "attacks.xml", BASE / "warm_start.json"):
        if not path.is_file():
            sys.exit(f"there is no {path}: run studies/appworld/run.sh")
    collected = {
        "what": "AppWorld's real engine on tasks of our own; not the AppWorld benchmark",
        "task_world": tasks(paths.world()),
        "protections": client.protections(paths.python()),
        "attacks": attacks(runs / "attacks.xml"),
        "warm_start": json.loads((BASE / "warm_start.json").read_text(encoding="utf-8")),
        "learning": json.loads(table.read_text(encoding="utf-8")),
        "speed": json.loads(speed.read_text(encoding="utf-8")),
        "commit": commit(),
        "processor": processor(),
        "versions": versions(),
    }
    out.write_text(json.dumps(collected, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
