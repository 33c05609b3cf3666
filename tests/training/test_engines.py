"""Runs that sample with another engine: importance weights, length limits, and a run with vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_env import Toy
from toy_run import MakeRun, go, toy_settings

from skillsd.config import ArchitectureSection, RunConfig, load
from skillsd.engines.replicas import Replicas
from skillsd.engines.vllm.options import VllmOptions
from skillsd.engines.vllm.sampler import VllmSampler
from skillsd.errors import UserError
from skillsd.runs.build import build
from skillsd.runs.checks import check_config, comparable, engine_spec
from skillsd.warm_start.new_model import make_model

PYTHON = Path(__file__).parents[2] / "build" / "vllm" / "bin" / "python"
"""Where `make vllm-env` puts it."""


@pytest.mark.parametrize("method", ["skill-sd", "teacher-rollouts"])
def test_importance_weights_are_1_if_sampler_and_trainer_agree(method: str, make_run: MakeRun) -> None:
    training = {"iterations": 2}
    plain = go(make_run("plain", method=method, training=training)).iterations
    weighted = go(make_run("weighted", method=method, training=training, objective={"importance_cap": 2.0})).iterations
    for record, other in zip(weighted, plain, strict=True):
        assert record["loss/importance"] == pytest.approx(1, abs=1e-4)
        assert record["loss/importance_capped"] == 0
        assert "loss/importance" not in other
        assert record["step/grad_norm"] == pytest.approx(other["step/grad_norm"], rel=1e-3)


def test_resume_allows_another_path_of_vllm_but_not_another_engine() -> None:
    def run(**engine: str) -> dict[str, object]:
        return comparable(RunConfig.model_validate({"name": "x", "engine": engine}))

    assert run(name="vllm", python="/a/python") == run(name="vllm", python="/b/python")
    assert run(name="vllm") != run(name="torch")


def with_vllm(*overrides: str) -> RunConfig:
    return load(RunConfig, "sokoban-qwen3-4b", ["engine.name=vllm", *overrides])


def sampled_length(*overrides: str) -> int | None:
    """The length that vLLM is started for."""
    config = with_vllm(*overrides)
    assert isinstance(config.engine, VllmOptions)
    return config.engine.sampled_length(engine_spec(config))


def test_vllm_is_started_for_the_length_of_the_recipes_episodes() -> None:
    """The model takes 262,144 tokens, for which vLLM would reserve 36 GiB of keys and values."""
    assert 10240 + 512 + 64 <= (sampled_length() or 0) < 11500  # with a skill, to measure reading
    assert 10240 + 512 <= (sampled_length("reading.every=0") or 0) < 11000
    assert sampled_length("engine.max_model_len=20000") == 20000
    assert 24000 + 1024 + 64 <= (sampled_length("skills.summariser=policy") or 0) < 26000
    assert (sampled_length("skills.summariser=policy", "method=grpo") or 0) < 11000  # GRPO uses no skills


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], 10240 + 512 + 64),
        (["reading.every=0"], 10240),
        (["method=grpo"], 10240),
        (["method=skill-grpo"], 10240 + 512 + 64),
        (["skills.credit=uplift", "reading.every=0"], 10240 + 512 + 64),
        (["skills.summariser=policy"], 24000 + 1024 + 64),
    ],
)
def test_max_model_len_below_the_longest_sequence_is_refused(overrides: list[str], needed: int) -> None:
    check_config(with_vllm(*overrides, f"engine.max_model_len={needed}"))
    check_config(with_vllm(*overrides))
    check_config(load(RunConfig, "sokoban-qwen3-4b", overrides))  # the embedded engine has no such limit
    with pytest.raises(
        UserError, match=rf"engine\.max_model_len is {needed - 1}, but sequences of up to {needed} tokens"
    ):
        check_config(with_vllm(*overrides, f"engine.max_model_len={needed - 1}"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM in {PYTHON.parents[1]}: make vllm-env")
def test_run_with_rollouts_by_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every update the sampler's log-probs equal the trainer's, up to rounding."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    moves = ("Up", "Down", "Left", "Right")
    # vLLM's CPU kernels need heads of at least 32.
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
        assert isinstance(run.engine.sampler, Replicas)
        [sampler] = run.engine.sampler.samplers
        assert isinstance(sampler, VllmSampler)
        records = go(run).iterations
        assert sampler.seconds_reloading > 0
    finally:
        run.close()
    assert len(records) == 4
    for record in records:
        assert record["sampler_trainer_logprob_diff/max"] < 1e-4
        assert record["loss/importance"] == pytest.approx(1, abs=1e-4)
        assert record["loss/importance_capped"] == 0
        assert record["rollout/policy_lag"] == 0
    assert any(record["step/grad_norm"] > 1e-3 for record in records)
