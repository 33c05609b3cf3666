"""Accuracy of the untouched, the warm-started and the trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts import PLAIN, RECIPE, SKILLSD, as_typed, part, run

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.report.writer import read
from skillsd.runs.lifecycle import CONFIG
from skillsd.training import checkpoint

LEVELS = 128
"""Of the 512 test levels, evenly spaced from easy to hard."""


def evaluations(folder: Path, base: Path, trained: Path) -> None:
    """Evaluate the models that exist."""
    subjects = {
        "untouched": ["--model", PLAIN, "--recipe", RECIPE],
        "warm-start": ["--model", str(base), "--recipe", RECIPE] if (base / "warm_start.json").is_file() else None,
        "trained": [str(trained)] if _finished(trained) else None,
    }
    for name, subject in subjects.items():
        if subject is None:
            print(f"evaluation-{name}: skipped, its model does not exist yet", flush=True)
            continue
        part(folder, f"evaluation-{name}", lambda name=name, subject=subject: evaluate(folder, name, subject))


def _finished(trained: Path) -> bool:
    """Whether a run has the checkpoint of its last iteration."""
    if not (trained / CONFIG).is_file():
        return False
    return configs.load(RunConfig, str(trained / CONFIG)).training.iterations in checkpoint.iterations(trained)


def evaluate(folder: Path, name: str, subject: Sequence[str], *more: str) -> dict[str, Any]:
    """Run `skillsd eval`; returns its records and the counts of turns and tokens."""
    log, out = folder / "episodes" / f"{name}.jsonl", folder / "episodes" / f"{name}.json"
    log.parent.mkdir(exist_ok=True)
    limit = [] if "--limit" in more else ["--limit", str(LEVELS)]
    command = [*SKILLSD, "eval", *subject, *limit, *more, "--episodes", str(log), "--json", str(out)]
    run(command)
    figures = json.loads(out.read_text())
    for record in figures:
        record |= _counts(log, record["temperature"])
    return {"command": as_typed(command), "figures": figures}


def _counts(log: Path, temperature: float) -> dict[str, int]:
    """Turns, invalid turns and sampled tokens of an evaluation's episodes at a temperature. An endpoint returns no
    token ids, so there the tokens are 0."""
    episodes = [
        record["episode"] for record in read(log) if "episode" in record and record["temperature"] == temperature
    ]
    turns = [turn for episode in episodes for turn in episode["turns"]]
    return {
        "turns": len(turns),
        "invalid_turns": sum(bool(turn["info"].get("invalid")) for turn in turns),
        "sampled_tokens": sum(sum(episode["action_mask"]) for episode in episodes),
    }
