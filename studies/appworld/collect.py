"""Collect the measurements of studies/appworld/run.sh in one JSON file: ``collect.py RUNS OUT``."""

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
    """Numbers of tasks by split, and within a split by app and by difficulty."""
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
    """Attack -> ``stopped`` if its test passed, ``open`` if it failed or the jail lacks what stops it."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"].removeprefix("test_attack_").removeprefix("by_").replace("_", " ")
        kinds = {child.tag: child.attrib.get("message", "") for child in case}
        if "failure" in kinds or "error" in kinds or "jail" in kinds.get("skipped", ""):
            found[name] = "open"
        else:
            found[name] = f"not tried: {kinds['skipped']}" if "skipped" in kinds else "stopped"
    return found


def times(log: Path) -> dict[str, int]:
    """Step of the study -> seconds, all its attempts together, without those that were killed."""
    found: Counter[str] = Counter()
    for line in log.read_text(encoding="utf-8").splitlines():
        step, seconds, _ = line.split("\t")
        found[step] += int(seconds)
    return dict(found)


def scenarios(table: Path) -> dict[str, Any]:
    """AppWorld's SGC, the share of whole scenarios solved, by cell of the table, which itself has only accuracies."""
    return {
        str(path.relative_to(table).with_suffix("").with_suffix("")): {
            row["temperature"]: row["scenario_accuracy"] for row in json.loads(path.read_text(encoding="utf-8"))
        }
        for path in sorted(table.glob("*/*/*.dev.json"))
    }


def main() -> None:
    runs, out = Path(sys.argv[1]), Path(sys.argv[2])
    speed = runs / "speed.json"
    table = runs / "table-appworld-smoke" / "table.json"
    for path in (table, speed, runs / "attacks.xml", runs / "uplift.json", BASE / "warm_start.json"):
        if not path.is_file():
            sys.exit(f"{path} is missing: run studies/appworld/run.sh")
    collected = {
        "what": "AppWorld's real engine on tasks of our own; not the AppWorld benchmark",
        "task_world": tasks(paths.world()),
        "protections": client.protections(paths.python(), paths.world()),
        "attacks": attacks(runs / "attacks.xml"),
        "warm_start": json.loads((BASE / "warm_start.json").read_text(encoding="utf-8")),
        "learning": json.loads(table.read_text(encoding="utf-8")),
        "uplift": json.loads((runs / "uplift.json").read_text(encoding="utf-8"))["summary"]["all"],
        "whole_scenarios": scenarios(table.parent),
        "test_split": {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((runs / "appworld-test").glob("*.json"))
        },
        "seconds": times(runs / "times.tsv"),
        "speed": json.loads(speed.read_text(encoding="utf-8")),
        "commit": commit(),
        "processor": processor(),
        "versions": versions(),
    }
    out.write_text(json.dumps(collected, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
