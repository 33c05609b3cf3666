"""The training loop on a toy environment: exact resume, non-finite losses, failing summarisers, held-out tasks."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_env import Toy
from toy_run import Listener, MakeRun, go, without_clocks

from skillsd.engines.base import SampleRequest, TokenSequence
from skillsd.engines.torch.decode import Decoder
from skillsd.engines.torch.steps import Decoded
from skillsd.errors import UserError
from skillsd.prompting.templates import render_skill
from skillsd.skills.bank import StoredSkill
from skillsd.training import checkpoint
from skillsd.training.loop import measure, train
from skillsd.training.run import Run
from skillsd.types import Outcome, Skill, Trajectory


def state(run: Run) -> dict[str, Any]:
    """Everything that determines how the run continues."""
    engine: Any = run.learner
    teacher = engine.teacher or {}
    return {
        "weights": {n: p.detach().clone() for n, p in engine.model.named_parameters()},
        "teacher": {n: p.clone() for n, p in teacher.items()},
        "optimiser": [
            {k: v.clone() for k, v in moments.items()}
            for moments in engine.optimiser.state_dict()["adamw"]["state"].values()
        ],
        "rng": torch.get_rng_state(),
        "bank": run.bank.skills(),
        "created": run.bank.created,
        "visits": run.visits,
        "iteration": run.iteration,
        "totals": {k: v for k, v in run.totals.items() if k != "seconds"},
        "summaries": run.summaries.stats() if run.summaries else {},
    }


def same(a: Any, b: Any) -> bool:
    """Bit-identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in a if not same(a[name], b[name])]


# -- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "sync_every", "stop_after"), [("grpo", 1, 3), ("skill-sd", 1, 1), ("skill-sd", 2, 3), ("skill-sd", 3, 4)]
)
def test_resumed_run_is_bit_identical_to_uninterrupted_run(
    make_run: MakeRun, method: str, sync_every: int, stop_after: int
) -> None:
    options: dict[str, Any] = {
        "method": method,
        "teacher": {"sync_every": sync_every},
        "training": {"epochs": 2, "warmup_iterations": 3},
        "objective": {"lambda_schedule": "linear_decay"},
        "curriculum": {"easy_first": True},
    }
    whole = make_run("whole", **options)
    expected = go(whole)

    first = make_run("parts", **options)
    before = Listener()
    stop = iter([False] * stop_after + [True] * 9)
    assert not asyncio.run(train(first, before, lambda: next(stop)))
    assert first.iteration == stop_after
    found = checkpoint.latest(first.folder)
    assert found is not None
    assert found.name == f"step-{stop_after}"
    left = state(first)
    first.close()

    torch.manual_seed(99)  # a new process starts with another random state
    second = make_run("parts", **options)
    after = Listener()

    async def resume() -> bool:
        await checkpoint.load(second, found)
        assert differences(left, state(second)) == []
        return await train(second, after)

    assert asyncio.run(resume())
    assert without_clocks(before.iterations + after.iterations) == without_clocks(expected.iterations)
    assert without_clocks(before.evaluations + after.evaluations) == without_clocks(expected.evaluations)
    assert before.groups + after.groups == expected.groups
    assert differences(state(whole), state(second)) == []
    if method == "skill-sd":
        assert any(skill.credited for skill in second.bank.skills())


def test_seed_determines_the_run(make_run: MakeRun) -> None:
    one, two, other = (go(make_run(folder, seed=seed)) for folder, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert without_clocks(one.iterations) == without_clocks(two.iterations)
    assert without_clocks(one.evaluations) == without_clocks(two.evaluations)
    assert one.groups == two.groups
    assert without_clocks(one.iterations) != without_clocks(other.iterations)


def test_run_stopped_before_first_iteration_is_evaluated_once(make_run: MakeRun) -> None:
    listener = Listener()
    assert not asyncio.run(train(make_run(), listener, lambda: True))
    run = make_run()

    async def resume() -> None:
        found = checkpoint.latest(run.folder)
        assert found is not None
        await checkpoint.load(run, found)
        await train(run, listener)

    asyncio.run(resume())
    assert [record["iteration"] for record in listener.evaluations] == [0, 2, 4, 6]


def test_run_without_iterations_only_evaluates(make_run: MakeRun) -> None:
    run = make_run(training={"iterations": 0})
    listener = go(run)
    assert [record["iteration"] for record in listener.evaluations] == [0]
    assert listener.iterations == []
    assert checkpoint.latest(run.folder) is not None


# -- records --------------------------------------------------------------------------------------------------------


def test_metrics_of_an_iteration(make_run: MakeRun) -> None:
    listener = go(make_run())
    assert [record["iteration"] for record in listener.iterations] == [1, 2, 3, 4, 5, 6]
    assert [record["iteration"] for record in listener.evaluations] == [0, 2, 4, 6]
    for record in listener.iterations:
        # Sampler and trainer compute the same log-probs, in float32.
        diff = [record[f"sampler_trainer_logprob_diff/{name}"] for name in ("p50", "p90", "p99", "max")]
        assert 0 <= diff[0] <= diff[1] <= diff[2] <= diff[3] < 1e-5
        assert record["episodes"] == 12 * record["iteration"]
        assert sum(record[f"outcome/{outcome}"] for outcome in Outcome) == pytest.approx(1.0)
        assert record["step/refused"] == 0
        assert record["step/grad_norm"] > 0
        assert record["time/iteration"] >= sum(record[f"time/{part}"] for part in ("rollout", "update")) * 0.999
    sampled = [
        sum(t.action_tokens for g in listener.groups[3 * i : 3 * i + 3] for t in g.trajectories) for i in range(6)
    ]
    assert [record["sampled_tokens"] for record in listener.iterations] == [sum(sampled[: i + 1]) for i in range(6)]


@pytest.mark.parametrize("decode", ["plain", "static"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampler_and_trainer_are_really_compared(
    dtype: str, decode: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's log-probs are its own: an error in the sampler's appears in the metric as it is."""
    error = 0.0
    sample = Decoder.sample

    async def wrong(decoder: Decoder, request: SampleRequest) -> Decoded:
        tokens, logprobs, stopped = await sample(decoder, request)
        return tokens, tuple(logprob - error for logprob in logprobs), stopped

    monkeypatch.setattr(Decoder, "sample", wrong)
    sections = {"model": {"dtype": dtype}, "engine": {"decode": decode}, "training": {"iterations": 1}}
    (record,) = go(make_run("right", **sections)).iterations
    right = record["sampler_trainer_logprob_diff/max"]
    assert 0 < right < (1e-5 if dtype == "float32" else 0.15)  # two ways to compute the same never round alike
    error = 2.0
    (record,) = go(make_run("wrong", **sections)).iterations
    for quantile in ("p50", "p99", "max"):
        assert record[f"sampler_trainer_logprob_diff/{quantile}"] == pytest.approx(error, abs=right + 0.15)


def test_first_visit_of_a_task_has_no_teacher_and_later_visits_do(make_run: MakeRun) -> None:
    # Seven tasks, three per iteration: each has been visited after the third iteration.
    listener = go(make_run())
    shares = [record["batch/groups_with_teacher"] for record in listener.iterations]
    assert shares[:2] == [0.0, 0.0]
    assert shares[2] == pytest.approx(2 / 3)
    assert shares[3:] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["constant", "linear_decay", "cosine"])
def test_lambda_schedule_and_warm_up_reach_the_update(
    make_run: MakeRun, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(
        objective={"lambda_sdl": 0.4, "lambda_schedule": schedule},
        training={"iterations": 4, "warmup_iterations": 2, "learning_rate": 0.01, "minibatches": 1},
    )
    used: list[float] = []
    rates: list[float] = []
    forward_backward, step = run.learner.forward_backward, run.learner.step

    async def watch_loss(batch: Any, loss: Any, **options: Any) -> Any:
        used.extend(term.weight for term in loss.terms if term.name == "distillation")
        return await forward_backward(batch, loss, **options)

    async def watch_step(rate: float) -> Any:
        rates.append(rate)
        return await step(rate)

    monkeypatch.setattr(run.learner, "forward_backward", watch_loss)
    monkeypatch.setattr(run.learner, "step", watch_step)
    listener = go(run)
    expected = {
        "constant": [0.4] * 4,
        "linear_decay": [0.4, 0.3, 0.2, 0.1],
        "cosine": [0.2 * (1 + math.cos(math.pi * i / 4)) for i in range(4)],
    }[schedule]
    assert used == pytest.approx(expected)
    assert [record["loss/lambda_sdl"] for record in listener.iterations] == pytest.approx(expected)
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01])


def test_teacher_is_synchronised_as_configured(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronised(folder: str, **teacher: Any) -> list[tuple[int, float]]:
        run = make_run(folder, teacher=teacher, evaluation={"every": 0})
        at: list[tuple[int, float]] = []
        sync = run.learner.sync_teacher

        async def watch(rate: float) -> None:
            at.append((run.iteration, rate))
            await sync(rate)

        monkeypatch.setattr(run.learner, "sync_teacher", watch)
        go(run)
        return at

    assert synchronised("a", sync_every=2) == [(0, 1.0), (2, 1.0), (4, 1.0)]
    assert synchronised("b", sync_every=3, ema=0.75) == [(0, 0.25), (3, 0.25)]


# -- skills ---------------------------------------------------------------------------------------------------------


def test_skills_are_written_from_training_trajectories_and_record_their_source(make_run: MakeRun) -> None:
    toy = Toy()
    run = make_run(toy=toy)
    listener = go(run)
    assert toy.summarised == [t for group in listener.groups for t in group.trajectories]
    assert all(t.task.split == "train" for t in toy.summarised)
    stored = run.bank.skills()
    assert stored
    for skill in stored:
        number, task, member = skill.source.split("/")
        assert number == f"iteration-{skill.iteration}"  # counted as in metrics.jsonl and the trajectory files
        groups = listener.groups[3 * (skill.iteration - 1) : 3 * skill.iteration]
        [source] = [g.trajectories[int(member)] for g in groups if g.task.id == task == skill.task_id]
        assert toy.write(source) == skill.skill
        assert (source.reward, source.outcome) == (skill.source_reward, skill.source_outcome)


def test_teacher_sees_the_tasks_own_skill_and_student_sees_none(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    learner, sampler = run.engine.learner, run.engine.sampler
    asked: list[tuple[int, ...]] = []
    scored: list[list[TokenSequence]] = []
    picked: list[StoredSkill] = []
    sample, logprobs, peek = sampler.sample, learner.logprobs, run.bank.peek

    async def watch_sample(request: SampleRequest) -> Any:
        asked.append(request.tokens)
        return await sample(request)

    async def watch_logprobs(sequences: Sequence[TokenSequence], weights: Any, **options: Any) -> Any:
        assert weights == "teacher"
        scored.append(list(sequences))
        return await logprobs(sequences, weights, **options)

    def watch_peek(task: Any, **options: Any) -> Any:
        found = peek(task, **options)
        if found:
            assert found.task_id == task.id
            picked.append(found)
        return found

    monkeypatch.setattr(sampler, "sample", watch_sample)
    monkeypatch.setattr(learner, "logprobs", watch_logprobs)
    monkeypatch.setattr(run.bank, "peek", watch_peek)
    listener = go(run)
    words = {run.renderer._encode(f" {word}")[0] for word in ("Workflow:", "Mistake:", "never")}
    assert picked
    for group in listener.groups:
        for trajectory in group.trajectories:
            assert not words & set(trajectory.tokens[: trajectory.prompt_length])
    first = {trajectory.tokens[: trajectory.prompt_length] for g in listener.groups for trajectory in g.trajectories}
    assert {tokens for tokens in asked if tokens in first} >= first
    sequences = [sequence for part in scored for sequence in part]
    assert len(sequences) == 4 * len(picked)
    for place, skill in enumerate(picked):
        text = run.renderer._encode(render_skill(skill.skill, run.template))
        for sequence in sequences[4 * place : 4 * place + 4]:
            assert any(sequence.tokens[i : i + len(text)] == text for i in range(len(sequence.tokens)))


def test_skill_is_credited_with_the_rewards_of_its_group(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    credited: list[tuple[str, list[float]]] = []
    credit = run.bank.credit

    def watch(skill: int, rewards: list[float]) -> bool:
        [task] = [s.task_id for s in run.bank.skills() if s.id == skill]
        credited.append((task, rewards))
        return credit(skill, rewards)

    monkeypatch.setattr(run.bank, "credit", watch)
    listener = go(run)
    visited: set[str] = set()
    expected = []
    for group in listener.groups:
        if group.task.id in visited:
            expected.append((group.task.id, group.rewards))
        visited.add(group.task.id)
    assert credited == expected


def test_skill_that_is_too_long_is_counted_and_not_credited(make_run: MakeRun) -> None:
    run = make_run(skills={"teacher_extra_tokens": 1})
    listener = go(run)
    assert [record["batch/groups_with_teacher"] for record in listener.iterations] == [0.0] * 6
    assert [record["batch/skills_over_budget"] for record in listener.iterations[3:]] == [1.0] * 3
    assert run.bank.counts()["picks"] > 0
    assert run.bank.counts()["credited"] == 0


def test_grpo_uses_no_skills_and_no_teacher(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    run = make_run(toy=toy, method="grpo")

    async def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("GRPO has no teacher")

    monkeypatch.setattr(run.learner, "logprobs", never)
    monkeypatch.setattr(run.learner, "sync_teacher", never)
    listener = go(run)
    assert len(run.bank) == 0
    assert toy.summarised == []
    assert all(record["loss/lambda_sdl"] == 0 for record in listener.iterations)


def _fails(trajectory: Trajectory) -> Skill:
    raise RuntimeError("the summariser failed")


def _returns_a_string(trajectory: Trajectory) -> Any:
    return "a string"


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("write", [_fails, _returns_a_string])
def test_failing_summariser_does_not_stop_training(make_run: MakeRun, deterministic: bool, write: Any) -> None:
    toy = Toy()
    toy.write = write
    run = make_run(toy=toy, skills={"deterministic": deterministic})
    listener = go(run)
    assert len(listener.iterations) == 6
    assert len(run.bank) == 0
    assert {"failed", "rejected_malformed"} & set(run.summaries.stats() if run.summaries else {})


@pytest.mark.parametrize("deterministic", [True, False])
def test_hanging_summariser_does_not_stop_training(make_run: MakeRun, deterministic: bool) -> None:
    run = make_run(
        skills={"deterministic": deterministic, "timeout_seconds": 0.02 if deterministic else 60},
        training={"iterations": 3},
    )
    assert run.summaries is not None

    class Hanging:
        async def summarise(self, trajectory: Trajectory) -> Skill | None:
            await asyncio.sleep(3600)
            return None

    run.summaries._summariser = Hanging()
    begin = time.monotonic()
    listener = go(run)
    assert time.monotonic() - begin < 30
    assert len(listener.iterations) == 3
    stats = run.summaries.stats()
    if deterministic:
        assert stats["timeout"] == stats["submitted"] == 36
    else:  # they are still in progress, and in the checkpoint
        found = checkpoint.latest(run.folder)
        assert found is not None
        assert len(json.loads((found / "state.json").read_text())["pending_summaries"]) == stats["pending"] == 36


def test_late_summaries_are_used_in_a_later_iteration(make_run: MakeRun) -> None:
    toy = Toy()
    run = make_run(toy=toy, skills={"deterministic": False})
    assert run.summaries is not None

    class Slow:
        async def summarise(self, trajectory: Trajectory) -> Skill | None:
            await asyncio.sleep(0.01)
            return toy.write(trajectory)

    run.summaries._summariser = Slow()
    listener = go(run)
    assert listener.iterations[0]["skills/new"] == 0
    assert len(run.bank) > 0


# -- held-out tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "skill-sd"])
def test_training_task_in_an_evaluation_split_is_refused(make_run: MakeRun, method: str) -> None:
    with pytest.raises(UserError, match=r"1 training tasks .*'train-0'"):
        make_run(toy=Toy(overlap=True), method=method)


def test_evaluation_split_must_be_held_out_and_known(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="held-out"):
        make_run(evaluation={"split": "train"})
    with pytest.raises(UserError, match=r"unknown split 'tne'.*'tune'"):
        make_run(evaluation={"split": "tne"})


def test_evaluation_changes_nothing(make_run: MakeRun) -> None:
    toy = Toy()
    run = make_run(toy=toy, evaluation={"greedy": True})
    go(run)
    before, rows, summarised = state(run), Path(run.bank.path).read_bytes(), len(toy.summarised)
    record = asyncio.run(measure(run, Listener()))
    assert same(before, state(run))
    assert Path(run.bank.path).read_bytes() == rows
    assert len(toy.summarised) == summarised
    assert record["eval/tasks"] == record["eval_greedy/tasks"] == 4
    assert (record["eval/temperature"], record["eval_greedy/temperature"]) == (1.0, 0.0)


def test_training_rollouts_use_the_plain_prompt(make_run: MakeRun) -> None:
    run = make_run()
    listener = go(run)
    for group in listener.groups:
        for trajectory in group.trajectories:
            plain = run.renderer.prompt(trajectory.prompt)
            assert trajectory.tokens[: trajectory.prompt_length] == plain


# -- non-finite losses, infrastructure failures ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_loss_updates_nothing_and_training_continues(
    make_run: MakeRun, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(training={"iterations": 3})
    learner: Any = run.learner
    moved: list[bool] = []
    forward_backward, step = learner.forward_backward, learner.step
    calls: list[None] = []

    async def poisoned(batch: Any, loss: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) != 3:  # the first minibatch of iteration 2
            return await forward_backward(batch, loss, **options)

        def bad_loss(*rest: Any) -> Any:
            value, metrics = loss(*rest)
            return value + bad, metrics

        return await forward_backward(batch, bad_loss, **options)

    async def watch(rate: float) -> Any:
        before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
        report = await step(rate)
        moved.append(not same(before, dict(learner.model.named_parameters())))
        assert report.applied == moved[-1]
        return report

    monkeypatch.setattr(learner, "forward_backward", poisoned)
    monkeypatch.setattr(learner, "step", watch)
    listener = go(run)
    assert moved == [True, True, False, True, True, True]
    assert [record["step/refused"] for record in listener.iterations] == [0, 1, 0]
    [note] = listener.notes
    path = run.folder / "not-finite" / "iteration-2-epoch-0-minibatch-0.pt"
    assert str(path) in note
    saved = torch.load(path)
    assert saved
    assert {"tokens", "mask", "signals"} <= saved[0].keys()


def test_dropped_groups_are_counted_and_the_others_are_trained_on(make_run: MakeRun) -> None:
    toy = Toy()

    def fault(at: str, environment: Any) -> None:
        if at == "reset" and environment.task.id == "train-3":
            raise RuntimeError("gone")

    toy.faults = fault
    run = make_run(toy=toy, rollout={"tasks_per_iteration": 7, "retries": 1}, training={"iterations": 2})
    listener = go(run)
    for record in listener.iterations:
        assert record["rollout/dropped_groups"] == 1
        assert record["infra_failures/env_error"] == 8
    assert listener.iterations[-1]["episodes"] == 2 * 6 * 4
    assert "train-3" not in {skill.task_id for skill in run.bank.skills()}


def test_iteration_without_groups_changes_nothing(make_run: MakeRun) -> None:
    toy = Toy()
    run = make_run(toy=toy, training={"iterations": 2}, rollout={"retries": 0})
    go_on = asyncio.run(train(run, Listener(), lambda: run.iteration == 1))
    assert not go_on
    toy.faults = lambda at, e: (_ for _ in ()).throw(OSError("gone")) if at == "reset" else None
    before = {n: p.detach().clone() for n, p in run.learner.model.named_parameters()}  # type: ignore[attr-defined]
    listener = go(run)
    assert len(listener.iterations) == 1
    assert same(before, dict(run.learner.model.named_parameters()))  # type: ignore[attr-defined]
    assert listener.iterations[-1]["episodes"] == 12
    assert "reset: OSError: gone" in listener.notes[0]


def test_error_if_every_episode_of_the_first_iteration_fails(make_run: MakeRun) -> None:
    toy = Toy()
    toy.faults = lambda at, e: (_ for _ in ()).throw(OSError("no server")) if at == "step" else None
    with pytest.raises(UserError, match=r"every episode of the evaluation on 'tune' failed.* no server"):
        go(make_run(toy=toy))

    def in_training(at: str, episode: Any) -> None:
        if at == "step" and episode.task.split == "train":
            raise OSError("no server")

    toy.faults = in_training
    with pytest.raises(UserError, match=r"every episode of iteration 1 failed .* no server"):
        go(make_run(toy=toy))


def test_more_minibatches_than_groups_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"minibatches is 4"):
        make_run(training={"minibatches": 4})


def test_more_tasks_per_iteration_than_tasks_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"tasks_per_iteration is 8, but the environment has 7"):
        make_run(rollout={"tasks_per_iteration": 8})


def test_error_if_prompts_leave_no_room_for_an_action(make_run: MakeRun) -> None:
    run = make_run(rollout={"trajectory_tokens": 3})
    with pytest.raises(UserError, match=r"trajectory_tokens is 3, but the prompts alone have 3 tokens"):
        go(run)


def test_trajectories_longer_than_the_model_takes_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"trajectory_tokens is 300"):
        make_run(rollout={"trajectory_tokens": 300})


def test_grpo_learns(make_run: MakeRun) -> None:
    run = make_run(
        toy=Toy(turns=1, sizes={"train": 1, "tune": 1}),
        method="grpo",
        rollout={"tasks_per_iteration": 1, "group_size": 64, "turn_tokens": 1},
        training={"iterations": 14, "learning_rate": 3e-2, "minibatches": 1},
        evaluation={"every": 0},
    )
    rewards = [record["rollout/reward"] for record in go(run).iterations]
    assert sum(rewards[:3]) / 3 < 0.75
    assert sum(rewards[-3:]) / 3 > 0.9
