"""Every example runs, and does what it says."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import skillsd
from skillsd import plugins
from skillsd.config import SftConfig, load
from skillsd.engines import conformance, registry
from skillsd.errors import UserError
from skillsd.runs.export import export
from skillsd.runs.lifecycle import run_training
from skillsd.runs.opened import open_run
from skillsd.warm_start.check import run_sft

EXAMPLES = Path(__file__).parents[2] / "examples"

ENGINE = "custom_engine:Plain"

SHORT = ("training.iterations=2", "curriculum.tasks=8", "rollout.tasks_per_iteration=4", "rollout.group_size=4",
         "evaluation.limit=4", "evaluation.every=0", "log.tensorboard=false")  # fmt: skip


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


# -- an engine from outside the package -----------------------------------------------------------------------------


def test_custom_engine_is_short() -> None:
    assert len((EXAMPLES / "custom_engine.py").read_text(encoding="utf-8").splitlines()) < 100


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_custom_engine_conforms(check: conformance.Check, tiny_model: Path) -> None:
    try:
        conformance.run_check(check, conformance.subject_of(registry.options({"name": ENGINE}), tiny_model))
    except conformance.SkippedCheck as skipped:
        pytest.skip(str(skipped))


@pytest.mark.parametrize("registered", [False, True], ids=["module:Class", "entry point"])
def test_custom_engine_trains_evaluates_exports_and_resumes(
    registered: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without touching a file of the package. Resumed, it ends with the weights of an uninterrupted run."""
    name = ENGINE
    if registered:
        point = EntryPoint("plain", ENGINE, plugins.ENGINES)
        monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == plugins.ENGINES else [])
        name = "plain"
        assert "plain" in registry.names()
    settings = (f"model.name={tiny_model}", f"engine.name={name}", "training.learning_rate=1e-3",
                "checkpoint.every=1", "rollout.trajectory_tokens=64", *SHORT)  # fmt: skip
    config = skillsd.load_recipe("sokoban-nano", *settings)
    whole = skillsd.train(config, out=tmp_path / "whole")
    assert [record["step/applied"] for record in whole.metrics] == [2, 2]
    assert whole.metrics[-1]["rollout/policy_lag"] == 0
    assert whole.metrics[-1]["sampler_trainer_logprob_diff/max"] < 1e-4

    resumed = tmp_path / "resumed"
    seen = []
    skillsd.train(skillsd.load_recipe("sokoban-nano", *settings, "training.iterations=1"), out=resumed)
    assert run_training(config, resumed, resume=True, on_record=lambda kind, record: seen.append(kind))
    assert seen.count("iteration") == 1
    assert weights(resumed) == weights(tmp_path / "whole")

    result = skillsd.evaluate(whole, split="test", limit=4)
    assert result.tasks == 4
    export(str(whole.folder), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="needs log-probs of the whole vocabulary, which the engine"):
        skillsd.train(skillsd.load_recipe("sokoban-nano", *settings, "objective.estimator=reverse_kl"),
                      out=tmp_path / "refused")  # fmt: skip


def weights(folder: Path) -> bytes:
    return (open_run(folder).model_folder() / "model.safetensors").read_bytes()


def test_conformance_from_the_command_line() -> None:
    """A wrong name is one line; no argument shows the usage."""
    command = [sys.executable, "-m", "skillsd.engines.conformance"]
    unknown = subprocess.run([*command, "torhc", "nano"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "Did you mean 'torch'?" in unknown.stderr
    assert "Traceback" not in unknown.stderr
    assert "usage:" in subprocess.run(command, capture_output=True, text=True, check=False).stderr


# -- the whole method in one file -----------------------------------------------------------------------------------


def test_one_file_is_the_loop(tmp_path: Path) -> None:
    """Its optimiser steps are the loop's: gradient norms, L_SDL, and the weights after them."""
    example: Any = module("skill_sd_one_file")
    assert len((EXAMPLES / "skill_sd_one_file.py").read_text(encoding="utf-8").splitlines()) <= 200
    lines: list[str] = []
    # Half of the 96 training tasks in each iteration: in the third one every task has a skill.
    engine, bank = asyncio.run(example.train(example.Settings(iterations=4, tasks=48, group=4), lines.append))
    run = skillsd.train(
        "sokoban-nano", "training.iterations=4", "rollout.tasks_per_iteration=48", "rollout.group_size=4",
        "training.minibatches=1", "training.micro_batch_tokens=8192", "evaluation.limit=4", "evaluation.every=0",
        "log.tensorboard=false", out=tmp_path / "run",
    )  # fmt: skip
    assert run.metrics[-1]["batch/groups_with_teacher"] > 0.9
    for line, record in zip(lines, run.metrics, strict=True):
        assert f"reward {record['rollout/reward']:.3f}" in line
        assert float(line.rpartition(" ")[2]) == pytest.approx(record["step/grad_norm"], rel=1e-5)
        if (k3 := record.get("loss/teacher_k3")) is not None:
            assert f"L_SDL {k3:.4f}" in line
    assert sum(map(len, bank.values())) == len(run.skills)
    from safetensors.torch import load_file

    theirs = load_file(run.model_folder() / "model.safetensors")
    largest = 0.0
    for name, weight in engine.learner.model.state_dict().items():
        if name in theirs:
            largest = max(largest, (weight - theirs[name]).abs().max().item())
    # AdamW divides by the gradient's size, so where that is tiny a last bit moves a weight by part of a step of 2e-4.
    assert largest < 2e-5


# -- the others -----------------------------------------------------------------------------------------------------


def test_train_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = module("train_from_python").main(tmp_path / "run", *SHORT)
    assert len(run.metrics) == 2
    assert "accuracy on 32 test tasks" in capsys.readouterr().out


def test_custom_summariser_writes_the_bank(tmp_path: Path) -> None:
    run = skillsd.train(
        "sokoban-nano", *SHORT, "skills.summariser=custom_summariser:Shortest", "summariser.options={most_turns: 9}",
        out=tmp_path / "run",
    )  # fmt: skip
    assert run.metrics[-1]["summaries/no_skill"] > 0
    assert run.skills
    assert all(skill["source_outcome"] == "solved" for skill in run.skills)
    assert all(len(skill["golden_workflow"].split()) <= 9 for skill in run.skills)


def test_custom_loss_trains(tmp_path: Path) -> None:
    run = skillsd.train(
        "sokoban-nano", *SHORT, "skills.hindsight=true", "objective.estimator=custom_loss:gated_iw_k3",
        'objective.terms=[{name: entropy_bonus, fn: "custom_loss:surprise", weight: 0.01}]', out=tmp_path / "run",
    )  # fmt: skip
    assert all("loss/entropy_bonus" in record for record in run.metrics)
    assert any("loss/distil_value" in record for record in run.metrics)


def base(tmp_path: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train the example's base model into the folder that its recipe for training names."""
    config = load(SftConfig, str(EXAMPLES / "guess-number-base.yaml"), overrides)
    return run_sft(config, tmp_path / "models" / config.name, lambda progress: None)


def test_custom_env_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = base(tmp_path, "warm_start.steps=2", "warm_start.batch=4", "check.limit=4")
    assert [row["prompt"] for row in rows] == ["plain", "golden skill", "another task's skill"]
    notes: list[str] = []
    run = skillsd.train(
        str(EXAMPLES / "guess-number.yaml"), "training.iterations=2", "rollout.group_size=2", "evaluation.limit=4",
        "evaluation.every=0", "log.tensorboard=false", on_note=notes.append,
    )  # fmt: skip
    assert not [note for note in notes if "learnt" in note], notes
    assert run.skills
    assert all(skill["golden_workflow"] for skill in run.skills)


@pytest.mark.slow
def test_custom_env_is_learnt_from_its_recipes_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, golden, _ = base(tmp_path)
    assert golden["sampled"] > plain["sampled"] + 0.2
    run = skillsd.train(str(EXAMPLES / "guess-number.yaml"))
    assert run.evaluations[-1]["eval/accuracy"] > run.evaluations[0]["eval/accuracy"] + 0.1


def test_custom_env_conforms() -> None:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "custom_env.py")], capture_output=True, text=True, check=False, cwd=EXAMPLES
    )
    assert ended.returncode == 0, ended.stderr
    assert "conforms" in ended.stdout
