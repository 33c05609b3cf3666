"""The settings of the sections ``skills`` and ``teacher``, tested from outside the training loop."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_env import Toy
from toy_run import Listener, MakeRun, go

from skillsd.methods import METHODS
from skillsd.skills.bank import HeldOutTaskError
from skillsd.training import checkpoint, credit, loop
from skillsd.training.imitation import BestSuccesses
from skillsd.training.loop import train
from skillsd.training.run import Run
from skillsd.types import Group, Outcome, Skill, Task, Trajectory


def record_teacher_contexts(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Filled while `run` trains: (task id, context of the teacher or None), one per group."""
    recorded: list[tuple[str, str | None]] = []
    build_batch = loop.build_batch

    async def watch(groups: Any, contexts: Any, *rest: Any, **options: Any) -> Any:
        recorded.extend((group.task.id, context.teacher) for group, context in zip(groups, contexts, strict=True))
        return await build_batch(groups, contexts, *rest, **options)

    monkeypatch.setattr(loop, "build_batch", watch)
    return recorded


# -- the teacher's context --------------------------------------------------------------------------------------------


def test_empty_context_gives_no_distillation_gradient(make_run: MakeRun) -> None:
    """Right after a sync a teacher without a skill equals the student, so the gradient is exactly zero."""
    run = make_run(
        method="opd", skills={"content": "empty"}, training={"minibatches": 1}, objective={"lambda_sdl": 1.0}
    )
    before = {name: p.detach().clone() for name, p in run.learner.model.named_parameters()}  # type: ignore[attr-defined]
    records = go(run).iterations
    assert records[-1]["batch/groups_with_teacher"] == 1.0
    assert {record["loss/teacher_k3"] for record in records if "loss/teacher_k3" in record} == {0.0}
    assert [record["step/grad_norm"] for record in records] == [0.0] * 6
    for name, p in run.learner.model.named_parameters():  # type: ignore[attr-defined]
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("hindsight", [False, True])
def test_shuffled_skills_belong_to_other_tasks(
    hindsight: bool, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The groups with a teacher are those with a skill of their own, as without shuffling: only the content differs."""
    toy = Toy()
    # Each skill names its task; three tasks never get one.
    without = {"train-1", "train-4", "train-5"}
    toy.write = lambda t: None if t.task.id in without else Skill("", "", f"of {t.task.id}")
    run = make_run(
        toy=toy,
        skills={"content": "shuffled", "hindsight": hindsight},
        rollout={"tasks_per_iteration": 4},
        training={"iterations": 8},
    )
    recorded = record_teacher_contexts(run, monkeypatch)
    go(run)
    used = [(task, context) for task, context in recorded if context]
    assert len(used) > 10
    assert not any(task in context for task, context in used)
    assert not without & {task for task, _ in used}
    assert run.bank.counts()["credited"] == 0  # rewards are not credited to another task's skill


def test_hindsight_works_in_an_iteration_without_groups(make_run: MakeRun) -> None:
    toy = Toy()
    run = make_run(toy=toy, skills={"content": "shuffled", "hindsight": True}, rollout={"retries": 0})

    def down(call: str, environment: Any) -> None:
        if run.iteration == 2:
            raise ConnectionError("down")

    toy.faults = down
    assert len(go(run).iterations) == 6


@pytest.mark.parametrize("sources", ["all", "successes", "failures"])
def test_sources_selects_the_trajectories_to_summarise(sources: str, make_run: MakeRun) -> None:
    run = make_run(skills={"sources": sources})
    go(run)
    found = {skill.source_outcome == Outcome.SOLVED for skill in run.bank.skills()}
    assert found == {"all": {True, False}, "successes": {True}, "failures": {False}}[sources]


def test_hindsight_teaches_a_group_with_its_own_skills(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(skills={"hindsight": True, "pick": "last"})
    recorded = record_teacher_contexts(run, monkeypatch)
    listener = go(run)
    assert listener.iterations[0]["batch/groups_with_teacher"] == 1.0  # no cold start
    for (task, context), group in zip(recorded, listener.groups, strict=True):
        assert task == group.task.id
        skills = [run.task_set.summariser()(t) for t in group.trajectories]  # type: ignore[misc]
        fields = {text for skill in skills if skill for text in (skill.golden_workflow, skill.mistake_analysis)}
        assert context is not None
        assert any(text and text in context for text in fields)


def test_max_group_reward_disables_the_teacher(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(teacher={"max_group_reward": 0.6}, skills={"hindsight": True})
    recorded = record_teacher_contexts(run, monkeypatch)
    listener = go(run)
    means = [sum(group.rewards) / len(group.rewards) for group in listener.groups]
    assert any(mean > 0.6 for mean in means)
    assert any(mean <= 0.6 for mean in means)
    for (_, context), mean in zip(recorded, means, strict=True):
        assert (context is None) == (mean > 0.6)
    assert run.bank.counts()["picks"] == sum(mean <= 0.6 for mean in means)  # an unused skill is not counted as picked


# -- credit ---------------------------------------------------------------------------------------------------------


def test_credit_source_is_the_source_trajectorys_reward(make_run: MakeRun) -> None:
    run = make_run(skills={"credit": "source"}, training={"iterations": 8})
    go(run)
    used = [skill for skill in run.bank.skills() if skill.credited]
    assert len(used) > 3
    for skill in used:
        assert skill.mean_reward == pytest.approx(skill.source_reward)


def test_credit_uplift_is_measured_before_the_update_and_counted_as_episodes(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(skills={"credit": "uplift", "uplift_episodes": 5}, training={"iterations": 8})
    measured: list[Any] = []
    plain: list[dict[str, float]] = []
    updates: list[int] = []
    measure, update = credit.measure_uplift, loop.update

    async def watch(*args: Any, **options: Any) -> Any:
        assert len(updates) == run.iteration
        found = await measure(*args, **options)
        plain.append(options["plain"])
        measured.extend(found)
        return found

    async def count(*args: Any, **options: Any) -> Any:
        updates.append(run.iteration)
        return await update(*args, **options)

    monkeypatch.setattr(credit, "measure_uplift", watch)
    monkeypatch.setattr(loop, "update", count)
    listener = go(run)
    means = [{g.task.id: sum(g.rewards) / len(g.rewards) for g in listener.groups[i : i + 3]} for i in range(0, 24, 3)]
    for known, played in zip(plain, means, strict=True):
        assert known == {task: played[task] for task in known}
    assert len(measured) > 5
    assert all(uplift.episodes == 5 for uplift in measured)
    credited = [skill.reward_sum for skill in run.bank.skills() if skill.credited]
    assert sum(credited) == pytest.approx(sum(uplift.reward for uplift in measured))
    trained = sum(len(group.trajectories) for group in listener.groups)
    assert listener.iterations[-1]["episodes"] == trained + 5 * len(measured)
    assert listener.iterations[-1]["episodes"] <= 8 * run.config.episodes_per_iteration


def test_credit_change_is_the_change_of_a_tasks_reward_by_its_next_visit(make_run: MakeRun) -> None:
    run = make_run(skills={"credit": "change"}, training={"iterations": 12})
    listener = go(run)
    expected: dict[int, list[float]] = {}
    before: dict[str, tuple[int, float]] = {}
    for group in listener.groups:
        mean = sum(group.rewards) / len(group.rewards)
        if group.task.id in before:
            skill, reward = before.pop(group.task.id)
            expected.setdefault(skill, []).append(mean - reward)
        if group.taught:
            before[group.task.id] = (group.skill_id, mean)
    found = {s.id: (s.credited, s.reward_sum) for s in run.bank.skills() if s.credited}
    assert len(found) > 5
    assert found == {skill: (len(changes), pytest.approx(sum(changes))) for skill, changes in expected.items()}


def test_only_so_many_trajectories_of_a_group_are_summarised_the_best_first(make_run: MakeRun) -> None:
    toy = Toy()
    run = make_run(toy=toy, skills={"per_group": 2})
    listener = go(run)
    assert len(toy.summarised) == 2 * len(listener.groups)
    pairs = zip(toy.summarised[::2], toy.summarised[1::2], strict=True)
    for group, summarised in zip(listener.groups, pairs, strict=True):
        best = sorted(enumerate(group.trajectories), key=lambda pair: (-pair[1].reward, pair[0]))[:2]
        assert [t.seed for t in summarised] == [t.seed for _, t in best]


# -- the teacher's weights ------------------------------------------------------------------------------------------


def test_moving_average_teacher_lies_between_start_and_student(make_run: MakeRun) -> None:
    run = make_run(teacher={"ema": 0.5}, training={"iterations": 1})
    learner: Any = run.learner
    start = {name: p.detach().clone() for name, p in learner.trainable.items()}
    go(run)
    moved = {name: p.detach().clone() for name, p in learner.trainable.items()}
    asyncio.run(learner.sync_teacher(0.5))
    for name, average in learner.teacher.items():
        assert torch.allclose(average, (start[name] + moved[name]) / 2, atol=1e-7)


# -- estimators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("method", ["skill-sd", "imitating"])
def test_top_k_divergence_approaches_the_whole_vocabularys(
    method: str, estimator: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "imitating", replace(METHODS["skill-sd"], name="imitating", imitation_weight=0.1))

    def value(folder: str, **objective: Any) -> float:
        run = make_run(
            folder,
            objective={"lambda_sdl": 0.1, "estimator": estimator, **objective},
            method=method,
            skills={"hindsight": True, "sources": "successes"},  # some groups have no teacher
            training={"iterations": 1, "minibatches": 1},
        )
        return float(go(run).iterations[0]["loss/distil_value"])

    learner: Any = make_run("vocabulary").learner
    whole, vocabulary = value("whole"), learner.model.config.vocab_size
    coarse = [value(f"top{k}", top_k=k) for k in (1, 8, vocabulary - 1)]
    assert 0 < coarse[0] < coarse[1] < coarse[2]
    assert coarse[2] == pytest.approx(whole, rel=1e-3)


# -- self-imitation -------------------------------------------------------------------------------------------------


def fake(task: Task, turns: int, success: bool) -> Trajectory:
    return Trajectory(task, (), (), (), (), 0, (object(),) * turns, Outcome.SOLVED, float(success), success, 0)  # type: ignore[arg-type]


def test_best_success_is_the_shortest_and_among_equals_the_newest() -> None:
    task = Task("a", "toy", "train")
    best = BestSuccesses()
    long, short, again, failed = fake(task, 5, True), fake(task, 3, True), fake(task, 3, True), fake(task, 1, False)
    for trajectory, expected in ((failed, None), (long, long), (short, short), (long, short), (again, again)):
        best.update([Group(task, (trajectory,))])
        assert best.of("a") is expected


def test_evaluation_task_is_never_imitated() -> None:
    task = Task("a", "toy", "test")
    with pytest.raises(HeldOutTaskError):
        BestSuccesses().update([Group(task, (fake(task, 1, True),))])


def test_resumed_run_imitates_the_same_successes(make_run: MakeRun) -> None:
    straight = make_run("straight", method="grpo-imitation")
    go(straight)

    first = make_run("first", method="grpo-imitation")
    asyncio.run(train(first, Listener(), lambda: first.iteration == 3))
    second = make_run("second", method="grpo-imitation")

    async def resume() -> None:
        newest = checkpoint.latest(first.folder)
        assert newest is not None
        await checkpoint.load(second, newest)
        await train(second, Listener())

    asyncio.run(resume())
    assert second.best is not None
    assert straight.best is not None
    assert second.best.state() == straight.best.state() != {}
    for a, b in zip(straight.learner.model.parameters(), second.learner.model.parameters(), strict=True):  # type: ignore[attr-defined]
        assert torch.equal(a, b)
