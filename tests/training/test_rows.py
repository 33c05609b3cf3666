"""Every row of the table of methods trains with the same loop, and each of its switches has its effect."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_env import Toy
from toy_run import MakeRun, go

from skillsd.errors import UserError
from skillsd.evaluation.evaluate import evaluate
from skillsd.methods import METHODS
from skillsd.runs.checks import check_engine
from skillsd.training import loop
from skillsd.types import Task


class WithOracle(Toy):
    def oracle(self, task: Task) -> str | None:
        return f"@r1c1 {task.payload['target']}"


@pytest.fixture
def other_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model with the same tokenizer and other weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.learner.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def settings_for(name: str, model: Path) -> dict[str, Any]:
    """Settings that a row requires."""
    return {"teacher": {"model": str(model)}} if METHODS[name].teacher == "external" else {}


@pytest.mark.parametrize("name", METHODS)
def test_row_trains(name: str, make_run: MakeRun, other_model: Path) -> None:
    row = METHODS[name]
    run = make_run(method=name, toy=WithOracle(), training={"iterations": 4}, **settings_for(name, other_model))
    before = weights(run)
    listener = go(run)
    assert not same(weights(run), before)
    taught = [record["batch/groups_with_teacher"] for record in listener.iterations]
    if row.teacher == "none":
        assert taught == [0.0] * 4
    elif row.context == "skill":
        assert taught[0] == 0 < taught[-1]
    else:
        assert taught == [1.0] * 4
    assert (len(run.bank) > 0) == row.uses_skills
    assert any(record.get("batch/imitated", 0) > 0 for record in listener.iterations) == (row.imitation_weight > 0)
    assert any("loss/imitation_loss" in record for record in listener.iterations) == (row.imitation_weight > 0)
    assert (run.bank.counts()["credited"] > 0) == row.uses_skills
    if row.teacher == "frozen":
        teacher = run.learner.teacher  # type: ignore[attr-defined]
        assert same(teacher, {n: before[n] for n in teacher})


@pytest.mark.parametrize("name", METHODS)
def test_context_is_only_in_the_prompts_that_the_row_says(
    name: str, make_run: MakeRun, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampling policy's prompt holds a context only if the row says so, and never in an evaluation."""
    row = METHODS[name]
    run = make_run(method=name, toy=WithOracle(), training={"iterations": 4}, **settings_for(name, other_model))
    sampler: Any = run.engine.sampler
    sample = sampler.sample
    words = {run.renderer._encode(f" {word}")[0] for word in ("Workflow:", "Mistake:")}
    asked: list[tuple[str, bool]] = []
    evaluating = False

    async def watch(request: Any) -> Any:
        sees_context = bool(words & set(request.tokens))
        assert not (evaluating and (sees_context or request.weights == "teacher"))
        if not evaluating:
            asked.append((request.weights, sees_context))
        return await sample(request)

    async def measure(*args: Any, **options: Any) -> Any:
        nonlocal evaluating
        evaluating = True
        try:
            return await evaluate(*args, **options)
        finally:
            evaluating = False

    monkeypatch.setattr(sampler, "sample", watch)
    monkeypatch.setattr(loop, "evaluate", measure)
    go(run)
    assert {weights for weights, _ in asked} == {row.sampler}
    assert {sees_context for _, sees_context in asked} == ({False, True} if row.sampler_sees_context else {False})


def test_teacher_rollouts_are_trained_on_under_the_plain_prompt(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(method="teacher-rollouts", training={"iterations": 4})
    learner: Any = run.learner
    trained: list[tuple[int, ...]] = []
    forward_backward = learner.forward_backward

    async def watch(items: Any, *rest: Any, **options: Any) -> Any:
        trained.extend(item.sequence.tokens for item in items)
        return await forward_backward(items, *rest, **options)

    monkeypatch.setattr(learner, "forward_backward", watch)
    listener = go(run)
    word = run.renderer._encode(" Workflow:")[0]
    sampled = [t.tokens for group in listener.groups for t in group.trajectories]
    assert any(word in tokens[: len(tokens) // 2] for tokens in sampled)
    assert not any(word in tokens for tokens in trained)


def test_distillation_alone_without_a_skill_changes_nothing(make_run: MakeRun) -> None:
    run = make_run(method="opd", training={"iterations": 1})  # the bank is empty at the first visit
    before = weights(run)
    go(run)
    assert same(weights(run), before)


@pytest.mark.parametrize(
    ("method", "sections", "message"),
    [
        ("opd-external", {}, "give its name or folder"),
        ("skill-sd", {"teacher": {"model": "nano"}}, "not external"),
        ("skill-sd-frozen", {"teacher": {"ema": 0.5}}, "not synchronised"),
        ("skill-sd-frozen", {"teacher": {"sync_every": 2}}, "not synchronised"),
        ("grpo", {"objective": {"reward_weight": 0}}, "nothing else to learn from"),
        ("skill-grpo", {"skills": {"hindsight": True}}, "needs the skill before the group is played"),
        ("skill-sd", {"skills": {"hindsight": True, "deterministic": False}}, "not be ready in time"),
        ("skill-grpo", {"skills": {"credit": "uplift"}}, "no episodes without the skill"),
        ("skill-sd", {"skills": {"content": "shuffled"}, "rollout": {"tasks_per_iteration": 1},
                      "training": {"minibatches": 1}}, "no other task's skill"),
        ("skill-sd", {"objective": {"top_k": 3}}, "top_k is for"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_row_are_refused(
    method: str, sections: dict[str, Any], message: str, make_run: MakeRun
) -> None:
    with pytest.raises(UserError, match=message):
        make_run(method=method, **sections)


def test_top_k_beyond_the_vocabulary_is_refused(make_run: MakeRun) -> None:
    run = make_run(objective={"top_k": 10**6, "estimator": "reverse_kl"})
    with pytest.raises(UserError, match=r"objective\.top_k is 1000000"):
        asyncio.run(check_engine(run))


def test_oracle_method_needs_reference_solutions(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="reference solution"):
        make_run(method="opsd")
