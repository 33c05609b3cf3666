from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_run import toy_settings

from skillsd.sweeps.plan import Sweep, plan


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> str:
    """A recipe file for the toy environment: 12 episodes per iteration, 6 iterations."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy_settings(tiny_model)))
    return str(path)


@pytest.fixture
def make_sweep(recipe: str, tmp_path: Path) -> Any:
    """`make_sweep(*overrides, **options)`: `plan` in ``tmp_path/out``."""

    def make(*overrides: str, **options: Any) -> Sweep:
        return plan(recipe, overrides, tmp_path / "out", **options)

    return make


@pytest.fixture
def two_models(tiny_model: Path, tmp_path: Path) -> list[str]:
    """Two folders that `plan` accepts as models."""
    names = []
    for name in ("one", "two"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
        names.append(str(tmp_path / "models" / name))
    return names
