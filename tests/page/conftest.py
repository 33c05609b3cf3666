"""A made-up run, and a made-up table of four runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up_run import make_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations of three groups of four; in the third, tasks of the first come again. Nothing may change it."""
    return make_run(tmp_path_factory.mktemp("page") / "a-run", iterations=3)


@pytest.fixture(scope="session")
def table_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "a-table"
    for method in ("grpo", "skill-sd"):
        for seed in (0, 1):
            make_run(folder / "nano" / method / f"seed-{seed}", iterations=2, tasks=2, seed=seed, method=method)
    (folder / "table.json").write_text(json.dumps(TABLE))
    return folder


def _row(accuracy: float, difference: float | None = None) -> dict[str, object]:
    interval = [accuracy - 0.03, accuracy + 0.03]
    found = {"mean": difference, "interval": [-0.01, 0.05], "pairs": 2}
    return {
        "accuracy": accuracy, "interval": interval, "completion": accuracy, "completion_interval": interval,
        "greedy_accuracy": accuracy, "greedy_interval": None, "cells": 2, "cells_asked": 2, "episodes": 16,
        "seconds": 20.0, **({} if difference is None else {"difference": {"accuracy": found}}),
    }  # fmt: skip


TABLE = {
    "split": "test", "tasks": 64, "unit": "seeds", "against": "grpo", "command": "skillsd table", "left_out": {},
    "findings": [], "made_with": {"commits": ["c"], "versions": {}},
    "budgets": {
        "16": {
            "base": {**_row(0.2815, -0.16), "episodes": 0}, "grpo": _row(0.4512), "skill-sd": _row(0.4706, 0.0194)
        }
    },
}  # fmt: skip
