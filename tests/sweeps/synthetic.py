"""Sweeps whose files are written instead of trained, with known results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skillsd import config as configs
from skillsd.report.manifest import model, texts, weights_fingerprint
from skillsd.runs.subjects import local_settings, replace_records
from skillsd.sweeps.plan import Cell, Sweep

Outcomes = Callable[[Cell, int | None], tuple[Sequence[float | None], Sequence[float | None]]]
"""(cell, iteration) -> sampled and greedy success per task."""

STARTED = "2026-01-01T00:00:00Z"


def fill(sweep: Sweep, outcomes: Outcomes, *, weights: Callable[[Cell], str] | None = None) -> None:
    """Write the files of finished cells, keeping existing evaluations.

    Args:
        weights: fingerprint of a cell's base model. Default: the model's own, or one made of its label if it has none.
    """
    own = {label: weights_fingerprint(name) or f"w-{label}" for label, name in sweep.models.items()}
    weights = weights or (lambda cell: own[cell.model])
    for cell in sweep.cells:
        if cell.trained:
            _run(sweep, cell, weights(cell))
        records = []
        for iteration in cell.iterations or (None,):
            for temperature, successes in zip((1.0, 0.0), outcomes(cell, iteration), strict=True):
                records.append(
                    {
                        "temperature": temperature,
                        "successes": successes,
                        "rewards": successes,
                        "split": sweep.split,
                        "fingerprint": sweep.panels[cell.seed][sweep.split],
                        "samples": sweep.samples if temperature else 1,
                        "settings": local_settings(cell.config),
                        "budget": {"turns": 3, "turn_tokens": 2, "trajectory_tokens": 48},
                        "iteration": iteration,
                        "seed": cell.seed,
                        "run": STARTED if cell.trained else None,
                        "model": {**model(sweep.models[cell.model]), "weights": weights(cell)},
                    }
                )
        path = cell.evaluation(sweep.split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(replace_records(records, path)))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Apply `change` to the content of a JSON file."""
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))


def _run(sweep: Sweep, cell: Cell, weights: str) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "config.yaml").write_text(configs.dump(cell.config))
    manifest = {
        "started": STARTED,
        "panels": dict(sweep.panels[cell.seed]),
        "model": {"name": "m", "weights": weights},
        "texts": texts(cell.config),
    }
    (cell.folder / "manifest.json").write_text(json.dumps(manifest))
    lines, curve = [], []
    for iteration in range(1, cell.iterations[-1] + 1):
        record = {
            "iteration": iteration,
            "episodes": iteration * cell.config.episodes_per_iteration,
            "seconds": 2.0 * iteration,
        }
        lines.append(json.dumps(record) + "\n")
        curve.append(json.dumps({**record, "eval/accuracy": iteration / 10}) + "\n")
    (cell.folder / "metrics.jsonl").write_text("".join(lines))
    (cell.folder / "evaluations.jsonl").write_text("".join(curve))
    for iteration in cell.iterations:
        (cell.folder / "checkpoints" / f"step-{iteration}").mkdir(parents=True, exist_ok=True)
