"""Whole runs whose rollouts come from elsewhere, and what is done about the difference."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_env import Toy
from toy_run import MakeRun, go, toy_settings

from skillsd.config import ArchitectureSection, RunConfig, load
from skillsd.engines.vllm.engine import VllmEngine
from skillsd.errors import UserError
from skillsd.training.run import build, check_config, comparable, sampled_length
from skillsd.warm_start.new_model import make_model

PYTHON = Path(__file__).parents[2] / "build" / "vllm" / "bin" / "python"
"""Where `make vllm-env` puts it."""


@pytest.mark.parametrize("method", ["skill-sd", "teacher-rollouts"])
def test_where_sampler_and_trainer_agree_importance_changes_nothing(method: str, make_run: MakeRun) -> None:
    training = {"iterations": 2}
    plain = go(make_run("plain", method=method, training=training)).iterations
    weighted = go(make_run("weighted", method=method, training=training, objective={"importance_cap": 2.0})).iterations
    for record, other in zip(weighted, plain, strict=True):
        assert record["loss/importance"] == pytest.approx(1, abs=1e-4)
        assert record["loss/importance_capped"] == 0
        assert "loss/importance" not in other
        assert record["step/grad_norm"] == pytest.approx(other["step/grad_norm"], rel=1e-3)


def test_a_resumed_run_may_find_vllm_elsewhere_but_not_sample_by_another_engine() -> None:
    def run(**engine: str) -> RunConfig:
        return comparable(RunConfig.model_validate({"name": "x", "engine": engine}))

    assert run(name="vllm", python="/a/python") == run(name="vllm", python="/b/python")
    assert run(name="vllm") != run(name="torch")


def with_vllm(*overrides: str) -> RunConfig:
    return load(RunConfig, "sokoban-qwen3-4b", ["engine.name=vllm", *overrides])


def test_vllm_is_asked_for_no_longer_sequences_than_episodes_are() -> None:
    """What the model takes, 262,144 tokens, would want 36 GiB of keys and values before vLLM starts."""
    assert 10240 + 512 <= (sampled_length(with_vllm()) or 0) < 11000
    assert sampled_length(with_vllm("engine.max_model_len=20000")) == 20000
    assert sampled_length(with_vllm("skills.summariser=policy")) is None
    assert sampled_length(with_vllm("skills.summariser=policy", "method=grpo")) is not None  # there are no skills


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], 10240),
        (["method=skill-grpo"], 10240 + 512 + 64),
        (["skills.credit=uplift"], 10240 + 512 + 64),
        (["skills.summariser=policy"], 24000 + 1024 + 64),
    ],
)
def test_limit_that_would_end_in_the_middle_of_a_run_is_refused(overrides: list[str], needed: int) -> None:
    check_config(with_vllm(*overrides, f"engine.max_model_len={needed}"))
    check_config(with_vllm(*overrides))
    check_config(load(RunConfig, "sokoban-qwen3-4b", [*overrides, "engine.max_model_len=100"]))  # vLLM's alone
    with pytest.raises(UserError, match=rf"engine\.max_model_len is {needed - 1}, but {needed} tokens"):
        check_config(with_vllm(*overrides, f"engine.max_model_len={needed - 1}"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM in {PYTHON.parents[1]}: make vllm-env")
def test_a_run_with_rollouts_by_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every update the sampler's log-probs are the trainer's again, to rounding."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    moves = ("Up", "Down", "Left", "Right")
    # vLLM's kernels for a CPU want heads of at least 32.
    architecture = ArchitectureSection(hidden_size=64, layers=2, heads=2, intermediate_size=64, max_length=256)
    (tmp_path / "model").mkdir()
    make_model(tmp_path / "model", architecture, [f" {move}" for move in moves] * 3, moves, seed=0)
    config = RunConfig.model_validate(
        toy_settings(
            tmp_path / "model",
            engine={"name": "vllm", "python": str(PYTHON), "timeout_seconds": 300},
            objective={"importance_cap": 2.0},
            training={"iterations": 4, "learning_rate": 1e-2},
        )
    )
    (tmp_path / "run").mkdir()
    run = build(config, tmp_path / "run", task_set=Toy())
    try:
        assert isinstance(run.engine, VllmEngine)
        records = go(run).iterations
        assert run.engine.seconds_reloading > 0
    finally:
        run.close()
    assert len(records) == 4
    for record in records:
        assert record["gap/max"] < 1e-4
        assert record["loss/importance"] == pytest.approx(1, abs=1e-4)
        assert record["loss/importance_capped"] == 0
    assert any(record["step/grad_norm"] > 1e-3 for record in records)
