"""Notes and checks on a recipe's settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_env import Toy

from skillsd import config as configs
from skillsd.cli.app import main
from skillsd.config import RunConfig, SftConfig
from skillsd.errors import UserError
from skillsd.runs.build import build
from skillsd.runs.checks import warm_start_note
from skillsd.warm_start.check import run_sft

PAIRS = {"sokoban-smollm2": "sokoban-smollm2-base", "appworld-smoke": "appworld-smoke-base"}
"""Recipe -> the recipe of its base model. That of `sokoban-nano` ships with its weights: `tests/test_nano_base.py`."""


@pytest.mark.parametrize("name", PAIRS)
def test_recipes_render_skills_as_their_warm_start_does(name: str) -> None:
    run, base = configs.load(RunConfig, name), configs.load(SftConfig, PAIRS[name])
    assert run.model.name == f"models/{base.name}"
    assert (run.skills.template, run.skills.place) == (base.warm_start.template, base.warm_start.place)


def test_default_is_the_papers_place() -> None:
    assert RunConfig(name="x").skills.place == SftConfig(name="x").warm_start.place == "before"


@pytest.mark.parametrize(
    ("trained", "settings", "expected"),
    [
        ({"place": "before"}, {}, None),
        ({"place": "after"}, {}, "set skills.place=after"),
        ({}, {}, "set skills.place=after"),  # a model from before the key
        ({}, {"skills": {"place": "after"}}, None),
        ({"place": "after", "template": "teacher_terse"}, {}, "set skills.template=teacher_terse skills.place=after"),
        ({"place": "after"}, {"method": "grpo"}, None),  # no prompt holds a skill
        ({"place": "after"}, {"method": "skill-grpo"}, "set skills.place=after"),
        ({"place": "after"}, {"method": "opd-external", "teacher": {"model": "m"}}, None),
    ],
)
def test_a_model_that_reads_skills_elsewhere_is_noted(
    tmp_path: Path, trained: dict[str, Any], settings: dict[str, Any], expected: str | None
) -> None:
    recipe = {"name": "base", "warm_start": {"template": "teacher", **trained}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    note = warm_start_note(RunConfig.model_validate({"name": "x", "model": {"name": str(tmp_path)}, **settings}))
    assert (note or "").endswith(expected or "")
    assert (note is None) == (expected is None)


@pytest.mark.parametrize(
    "content", ["", "[]", "name: x", "warm_start: 3", "warm_start: {place: before}", "a: [", "\xe4"]
)
def test_other_files_of_that_name_are_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content.encode("latin-1"))
    assert warm_start_note(RunConfig.model_validate({"name": "x", "model": {"name": str(tmp_path)}})) is None
    assert warm_start_note(RunConfig.model_validate({"name": "x", "model": {"name": "Qwen/Qwen3"}})) is None


def test_the_shipped_recipe_has_no_such_note() -> None:
    config = configs.load(RunConfig, "sokoban-nano")
    assert warm_start_note(config) is None
    other = {"before": "after", "after": "before"}[config.skills.place]
    note = warm_start_note(configs.load(RunConfig, "sokoban-nano", [f"skills.place={other}"]))
    assert note is not None
    assert f"skills.place={config.skills.place}" in note


def refuse(task_set: Toy) -> None:
    raise UserError("no jail here")


def test_a_machine_is_checked_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a run, a warm start, and an evaluation of a model."""
    monkeypatch.setattr(Toy, "check_machine", refuse)
    settings = {"name": "x", "model": {"name": str(tmp_path / "none")}, "environment": {"name": "toy_env:Toy"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(UserError, match="no jail here"):
        build(RunConfig.model_validate(settings), tmp_path / "run")
    with pytest.raises(UserError, match="no jail here"):
        run_sft(SftConfig.model_validate(settings), tmp_path / "base", on_step=lambda progress: None)
    assert not (tmp_path / "base").exists()
    command = ["skillsd", "eval", "--model", str(tmp_path), "--recipe", str(recipe), "--split", "tune"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        main()
    assert "no jail here" in "".join(capsys.readouterr())
