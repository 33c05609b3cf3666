"""`skillsd skills uplift` and `skillsd skills gap`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_env import Toy
from toy_run import toy_settings

from skillsd.cli.app import main
from skillsd.cli.common import console
from skillsd.cli.skill_value import _compared, opened
from skillsd.config import RunConfig, load
from skillsd.evaluation.uplift import Uplift
from skillsd.runs.lifecycle import run_training
from skillsd.skills.bank import Bank
from skillsd.types import Outcome, Skill

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def skills(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """`skillsd skills ...`: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_width", 300)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["skillsd", "skills", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four iterations, with checkpoints of the second and the last."""
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("uplift")
    for name, changes in {"run": {}, "grpo": {"method": "grpo"}}.items():
        settings = toy_settings(tiny_model, training={"iterations": 4}, rollout={"tasks_per_iteration": 7}, **changes)
        (made / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        run_training(load(RunConfig, str(made / f"{name}.yaml")), made / name)
    return made


def test_uplift(skills: Command, folder: Path, tmp_path: Path) -> None:
    run = folder / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, output, errors = skills("uplift", run, "--episodes", 2, "--json", "figures.json")
    assert code == 0, errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    figures = json.loads((tmp_path / "figures.json").read_text())
    with Bank(run / "skills.sqlite") as bank:
        picked = {skill.id for skill in bank.skills() if skill.picks}
    assert [record["id"] for record in figures["skills"]] == sorted(picked, reverse=True)
    assert (figures["iteration"], figures["weights"], figures["left_out"]) == (4, "student", 0)
    overall = figures["summary"]["all"]
    assert overall["skills"] == len(picked)
    assert f"{100 * overall['success']:.1f} %" in output
    assert all(kind in output for kind in figures["summary"])
    first = figures["skills"][0]
    assert first["uplift"]["success"] == first["uplift"]["success_with"] - first["uplift"]["success_without"]
    assert "uplift" in output
    # The same skills with the untrained model, as `--at base` measures them.
    assert figures["base"]["iteration"] == 0
    assert [record["id"] for record in figures["base"]["skills"]] == sorted(picked, reverse=True)
    assert "Uplift of the same skills: base" in output
    assert skills("uplift", run, "--episodes", 2, "--at", "base", "--json", "0")[0] == 0
    alone = json.loads(Path("0").read_text())
    assert "base" not in alone
    assert {key: alone[key] for key in figures["base"]} == figures["base"]
    assert "…" not in output

    # The same skill alone, selected by its task; then other weights.
    code, output, errors = skills(
        "uplift", run, "--episodes", 2, "--task", first["task_id"], "--limit", 1, "--json", "1"
    )
    assert code == 0, errors
    assert json.loads(Path("1").read_text())["skills"] == [first]
    assert skills("uplift", run, "--limit", 2, "--at", "base", "--teacher", "--json", "2")[0] == 0
    assert json.loads(Path("2").read_text())["iteration"] == 0
    assert skills("uplift", run, "--limit", 2, "--at", 2, "--all", "--json", "3")[0] == 0
    assert json.loads(Path("3").read_text())["iteration"] == 2


def uplifts(*points: tuple[float, float]) -> Any:
    """Skills of as many tasks, with their success with and without the skill."""
    return [(None, Uplift(i, f"t{i}", w, wo, w, wo, 8)) for i, (w, wo) in enumerate(points)]


def test_outgrown_skills_are_explained() -> None:
    helped, neutral, harmed = (
        uplifts(*[(with_skill + 0.02, without), (with_skill - 0.02, without)] * 6)
        for with_skill, without in ((0.7, 0.4), (0.8, 0.8), (0.6, 0.8))
    )
    assert "outgrown" not in _compared(helped, helped, "student after 9 iterations")
    assert "outgrown" not in _compared(harmed, harmed, "student after 9 iterations"), "they never helped"
    text = _compared(helped, neutral, "student after 9 iterations")
    assert "base +30.0 points (40.0 % without them), student after 9 iterations +0.0 points (80.0 %" in text
    assert "outgrown" in text
    assert "costs" not in text
    assert "costs successes" in _compared(helped, harmed, "student after 9 iterations")


def test_gap(skills: Command, folder: Path, tmp_path: Path) -> None:
    code, output, errors = skills("gap", folder / "run", "--episodes", 2, "--json", "gap.json")
    assert code == 0, errors
    figures = json.loads((tmp_path / "gap.json").read_text())
    everything = figures["rows"][0]
    assert (everything["split"], everything["turns"]) == ("all", "all")
    assert everything["kl"] > 0
    assert f"{everything['kl']:.4f}" in output
    code, _, errors = skills("gap", folder / "run", "--tasks", 3, "--teacher", "base", "--at", 2, "--json", "base.json")
    assert code == 0, errors
    base = json.loads((tmp_path / "base.json").read_text())
    assert (base["teacher"], base["iteration"], base["tasks"] + base["without_teacher"]) == ("base", 2, 3)


def test_opened_run_has_the_checkpoints_weights(folder: Path) -> None:
    def weights(at: str | None) -> torch.Tensor:
        with opened(folder / "run", at) as run:
            learner: Any = run.learner
            return next(learner.model.parameters()).detach().clone()

    base, second, newest = weights("base"), weights("2"), weights(None)
    assert torch.equal(newest, weights("4"))
    assert not torch.equal(base, second)
    assert not torch.equal(second, newest)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["uplift", "nowhere"], "is not a run's folder"),
        (["gap", "nowhere"], "is not a run's folder"),
        (["uplift", "run", "--task", "train-99"], "'train-99'"),
        (["uplift", "run", "--at", "3"], "2, 4"),
        (["gap", "run", "--at", "three"], "'base'"),
        (["gap", "run", "--teacher", "bse"], "'base'"),
        (["uplift", "run", "--episodes", "0"], "--episodes"),
        (["uplift", "run", "--json", "no/folder/x.json"], "no/folder"),
        (["uplift", "grpo"], "empty"),
        (["gap", "grpo"], "empty"),
    ],
)
def test_mistake_gives_one_line(
    skills: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(folder)
    code, output, errors = skills(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    assert expected in errors


def test_run_without_a_bank_or_a_checkpoint(skills: Command, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((folder / "run" / "config.yaml").read_text())
    assert "no skill bank" in skills("uplift", "run")[2]
    assert not (tmp_path / "run" / "skills.sqlite").exists()
    Bank(tmp_path / "run" / "skills.sqlite").close()
    assert "no checkpoint" in skills("uplift", "run")[2]
    assert "empty" in skills("uplift", "run", "--at", "base")[2]


def test_never_picked_skills_need_all(skills: Command, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((folder / "run" / "config.yaml").read_text())
    with Bank(tmp_path / "run" / "skills.sqlite") as bank:
        known = {"source": "x", "iteration": 1, "reward": 1.0, "outcome": Outcome.SOLVED}
        bank.add(Toy().tasks("train")[0], Skill("", "", "Up"), **known)  # type: ignore[arg-type]
    assert "--all" in skills("uplift", "run", "--at", "base")[2]
    assert skills("uplift", "run", "--at", "base", "--all")[0] == 0
