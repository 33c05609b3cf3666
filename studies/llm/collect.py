"""All measurements as one JSON file."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts import EVALUATIONS, PARTS

from skillsd.evaluation.evaluate import student
from skillsd.report import manifest
from skillsd.report.writer import read


def collect_all(folder: Path, base: Path, trained: Path) -> dict[str, Any]:
    """All measurements that exist; ``missing`` lists the others."""
    parts = {name: json.loads(path.read_text()) for name in PARTS if (path := folder / f"{name}.json").is_file()}
    missing = [f"{name}.json" for name in PARTS if name not in parts]
    found: dict[str, Any] = {"machine": machine(), "commit": manifest.commit(), "versions": manifest.versions()}
    evaluated = {name: parts[f"evaluation-{name}"] for name in EVALUATIONS if f"evaluation-{name}" in parts}
    found["accuracy"] = {name: _accuracy(measured) for name, measured in evaluated.items()}
    found["differences"] = _differences(evaluated)
    if (path := base / "warm_start.json").is_file():
        found["warm_start"] = {
            "command": f"skillsd sft sokoban-smollm2-base --out {base}",
            **json.loads(path.read_text()),
        }
    else:
        missing.append(str(path))
    rows = read(trained / "metrics.jsonl")
    if rows:
        found["training"] = _training(trained, rows)
    else:
        missing.append(str(trained / "metrics.jsonl"))
    for kind in ("gap", "memory"):
        found[kind] = {
            name.removeprefix(f"{kind}-"): measured for name, measured in parts.items() if name.startswith(f"{kind}-")
        }
    found["server"] = {
        "untouched" if path.stem == "server" else path.stem.removeprefix("server-"): json.loads(path.read_text())
        for path in sorted(folder.glob("server*.json"))
    }
    return rounded({**found, "missing": missing})


def machine() -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"processor": manifest.processor(), "cores": os.cpu_count(), "memory_gib": pages / (1 << 30), "gpu": None}


def _accuracy(measured: dict[str, Any]) -> dict[str, Any]:
    kept = ("accuracy", "interval", "tasks", "episodes", "turns", "invalid_turns", "sampled_tokens", "mean_turns")
    kept += ("outcomes", "seconds", "fingerprint", "iteration", "budget", "model", "successes")
    records = {
        "greedy" if record["temperature"] == 0 else "sampled": {key: record[key] for key in kept}
        for record in measured["figures"]
    }
    return {**records, "command": measured["command"], "measured": measured["measured"]}


def _differences(evaluated: dict[str, Any]) -> dict[str, Any]:
    """Success after minus before, paired by level, with Student's t interval over the levels."""
    found: dict[str, Any] = {}
    for before, after in (("untouched", "warm-start"), ("warm-start", "trained")):
        if before not in evaluated or after not in evaluated:
            continue
        both = [{r["temperature"]: r for r in evaluated[name]["figures"]} for name in (before, after)]
        for temperature in both[0].keys() & both[1].keys():
            first, then = (records[temperature] for records in both)
            if first["fingerprint"] != then["fingerprint"]:
                sys.exit(f"{before} and {after} were evaluated on different levels: evaluate one of them again")
            pairs = zip(first["successes"], then["successes"], strict=True)
            changes = [b - a for a, b in pairs if a is not None and b is not None]
            name = f"{after} minus {before}, {'greedy' if temperature == 0 else 'sampled'}"
            interval = student(changes, bounds=(-1.0, 1.0))
            found[name] = {
                "difference": sum(changes) / len(changes),
                "interval": interval,
                "levels": len(changes),
                "gained": sum(change > 0 for change in changes),
                "lost": sum(change < 0 for change in changes),
            }
    return dict(sorted(found.items()))


def _training(trained: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    phases = [key for key in rows[-1] if key.startswith("time/")]
    played = [row["episodes"] - before for row, before in zip(rows, [0, *(r["episodes"] for r in rows)], strict=False)]
    read_tokens = [row["rollout/tokens"] * count for row, count in zip(rows, played, strict=True)]
    speeds = {
        "rollout, sampled": [row["rollout/sampled_tokens_per_second"] for row in rows],
        "rollout, all": [n / row["time/rollout"] for n, row in zip(read_tokens, rows, strict=True)],
        "update, all": [n / row["time/update"] for n, row in zip(read_tokens, rows, strict=True)],
    }
    known = json.loads((trained / "manifest.json").read_text())
    return {
        "command": shlex.join(["skillsd", *known["command"][1:]]),
        "manifest": {key: known[key] for key in ("started", "commit", "versions", "model", "seed")},
        "iterations": len(rows),
        "episodes": rows[-1]["episodes"],
        "seconds": {key.removeprefix("time/"): _of([row.get(key, 0.0) for row in rows]) for key in phases},
        "tokens_per_second": {key: _of(values) for key, values in speeds.items()},
        "tokens_per_episode": _of([row["rollout/tokens"] for row in rows]),
        "peak_mib": rows[-1].get("memory/peak_mib"),
        "rows": rows,
        "evaluations": read(trained / "evaluations.jsonl"),
    }


def _of(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values), "median": statistics.median(values), "min": min(values), "max": max(values)
    }  # fmt: skip


def rounded(value: Any) -> Any:
    """Rounded to five significant digits: some gaps are of the order of 1e-6."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
