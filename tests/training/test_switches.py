"""The switches of the skill side (skills.*, teacher.*): each does what it says, seen from outside the loop."""

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
from skillsd.training import checkpoint, loop
from skillsd.training.imitation import BestSuccesses
from skillsd.training.loop import train
from skillsd.training.run import Run
from skillsd.types import Group, Outcome, Skill, Task, Trajectory


def teachers_prompts(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Filled while `run` trains: (task, what its teacher was told or None), a group at a time."""
    heard: list[tuple[str, str | None]] = []
    build_batch = loop.build_batch

    def watch(groups: Any, told: Any, *rest: Any, **options: Any) -> Any:
        heard.extend((group.task.id, words.teacher) for group, words in zip(groups, told, strict=True))
        return build_batch(groups, told, *rest, **options)

    monkeypatch.setattr(loop, "build_batch", watch)
    return heard


# -- what the teacher is told ---------------------------------------------------------------------------------------


def test_an_empty_skill_teaches_nothing(make_run: MakeRun) -> None:
    """At sync the teacher that sees no skill *is* the student: the distillation's gradient is exactly zero."""
    run = make_run(
        method="opd", skills={"content": "empty"}, training={"minibatches": 1}, objective={"lambda_sdl": 1.0}
    )
    before = {name: p.detach().clone() for name, p in run.engine.model.named_parameters()}  # type: ignore[attr-defined]
    heard = go(run)
    assert heard.iterations[-1]["batch/groups_with_teacher"] == 1.0
    assert {record["loss/teacher_k3"] for record in heard.iterations if "loss/teacher_k3" in record} == {0.0}
    assert [record["step/grad_norm"] for record in heard.iterations] == [0.0] * 6
    for name, p in run.engine.model.named_parameters():  # type: ignore[attr-defined]
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("hindsight", [False, True])
def test_shuffled_skills_are_always_another_tasks(
    hindsight: bool, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the groups that are taught are those that have a skill of their own: only the content differs."""
    toy = Toy()
    # Skills that say whose they are; three tasks never have one.
    unlucky = {"train-1", "train-4", "train-5"}
    toy.write = lambda t: None if t.task.id in unlucky else Skill("", "", f"of {t.task.id}")
    run = make_run(
        toy=toy,
        skills={"content": "shuffled", "hindsight": hindsight},
        rollout={"tasks_per_iteration": 4},
        training={"iterations": 8},
    )
    heard = teachers_prompts(run, monkeypatch)
    go(run)
    told = [(task, words) for task, words in heard if words]
    assert len(told) > 10
    assert not any(task in words for task, words in told)
    assert not unlucky & {task for task, _ in told}
    assert run.bank.counts()["credited"] == 0, "what another task's skill earns is not its own"


def test_hindsight_survives_an_iteration_that_lost_every_group(make_run: MakeRun) -> None:
    toy = Toy()
    run = make_run(toy=toy, skills={"content": "shuffled", "hindsight": True}, rollout={"retries": 0})

    def down(call: str, environment: Any) -> None:
        if run.iteration == 2:
            raise ConnectionError("down")

    toy.faults = down
    assert len(go(run).iterations) == 6


@pytest.mark.parametrize("sources", ["all", "successes", "failures"])
def test_skills_are_written_from_the_trajectories_that_are_asked_for(sources: str, make_run: MakeRun) -> None:
    run = make_run(skills={"sources": sources})
    go(run)
    found = {skill.source_outcome == Outcome.SOLVED for skill in run.bank.skills()}
    assert found == {"all": {True, False}, "successes": {True}, "failures": {False}}[sources]


def test_with_hindsight_a_group_is_taught_by_what_it_did_itself(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(skills={"hindsight": True, "pick": "last"})
    heard = teachers_prompts(run, monkeypatch)
    listener = go(run)
    assert listener.iterations[0]["batch/groups_with_teacher"] == 1.0, "no cold start"
    for (task, words), group in zip(heard, listener.groups, strict=True):
        assert task == group.task.id
        lessons = [run.task_set.summariser()(t) for t in group.trajectories]  # type: ignore[misc]
        said = {part for lesson in lessons if lesson for part in (lesson.golden_workflow, lesson.mistake_analysis)}
        assert words is not None
        assert any(text and text in words for text in said)


def test_a_group_above_the_bound_has_no_teacher(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(teacher={"max_group_reward": 0.6}, skills={"hindsight": True})
    heard = teachers_prompts(run, monkeypatch)
    listener = go(run)
    means = [sum(group.rewards) / len(group.rewards) for group in listener.groups]
    assert any(mean > 0.6 for mean in means)
    assert any(mean <= 0.6 for mean in means)
    for (_, words), mean in zip(heard, means, strict=True):
        assert (words is None) == (mean > 0.6)
    assert run.bank.counts()["picks"] == sum(mean <= 0.6 for mean in means), "who was not told did not use it"


# -- what a skill earns ---------------------------------------------------------------------------------------------


def test_credit_by_source_is_the_reward_that_the_skill_came_from(make_run: MakeRun) -> None:
    run = make_run(skills={"credit": "source"}, training={"iterations": 8})
    go(run)
    used = [skill for skill in run.bank.skills() if skill.credited]
    assert len(used) > 3
    for skill in used:
        assert skill.mean_reward == pytest.approx(skill.source_reward)


def test_credit_by_uplift_is_measured_and_counted_as_episodes(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(skills={"credit": "uplift", "uplift_episodes": 5}, training={"iterations": 8})
    measured: list[Any] = []
    plain: list[dict[str, float]] = []
    updates: list[int] = []
    measure, optimise = loop.measure_uplift, loop.optimise

    async def watch(*args: Any, **options: Any) -> Any:
        assert len(updates) == run.iteration, "the policy that was taught is the one before the update"
        found = await measure(*args, **options)
        plain.append(options["plain"])
        measured.extend(found)
        return found

    def count(*args: Any) -> Any:
        updates.append(run.iteration)
        return optimise(*args)

    monkeypatch.setattr(loop, "measure_uplift", watch)
    monkeypatch.setattr(loop, "optimise", count)
    listener = go(run)
    means = [{g.task.id: sum(g.rewards) / len(g.rewards) for g in listener.groups[i : i + 3]} for i in range(0, 24, 3)]
    for known, played in zip(plain, means, strict=True):
        assert known == {task: played[task] for task in known}
    assert len(measured) > 5
    assert all(uplift.episodes == 5 for uplift in measured)
    credited = [skill.reward_sum for skill in run.bank.skills() if skill.credited]
    assert sum(credited) == pytest.approx(sum(uplift.score for uplift in measured))
    trained = sum(len(group.trajectories) for group in listener.groups)
    assert listener.iterations[-1]["episodes"] == trained + 5 * len(measured)
    assert listener.iterations[-1]["episodes"] <= 8 * run.config.episodes_per_iteration


# -- the teacher's cadence ------------------------------------------------------------------------------------------


def test_a_moving_average_lies_between_the_student_and_where_it_began(make_run: MakeRun) -> None:
    run = make_run(teacher={"ema": 0.5}, training={"iterations": 1})
    engine: Any = run.engine
    start = {name: p.detach().clone() for name, p in engine._trainable.items()}
    go(run)
    moved = {name: p.detach().clone() for name, p in engine._trainable.items()}
    engine.sync_teacher(0.5)
    for name, average in engine._teacher.items():
        assert torch.allclose(average, (start[name] + moved[name]) / 2, atol=1e-7)


# -- estimators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("method", ["skill-sd", "imitating"])
def test_the_top_k_and_one_bucket_come_near_the_whole_vocabulary(
    method: str, estimator: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "imitating", replace(METHODS["skill-sd"], name="imitating", imitation_weight=0.1))

    def value(folder: str, **objective: Any) -> float:
        run = make_run(
            folder,
            objective={"lambda_sdl": 0.1, "estimator": estimator, **objective},
            method=method,
            skills={"hindsight": True, "sources": "successes"},  # so that some groups have no teacher
            training={"iterations": 1, "minibatches": 1},
        )
        return float(go(run).iterations[0]["loss/distil_value"])

    engine: Any = make_run("vocabulary").engine
    whole, vocabulary = value("whole"), engine.model.config.vocab_size
    coarse = [value(f"top{k}", top_k=k) for k in (1, 8, vocabulary - 1)]
    assert 0 < coarse[0] < coarse[1] < coarse[2]
    assert coarse[2] == pytest.approx(whole, rel=1e-3)


# -- self-imitation -------------------------------------------------------------------------------------------------


def fake(task: Task, turns: int, success: bool) -> Trajectory:
    toy = [object()] * turns
    return Trajectory(task, (), (), (), (), 0, tuple(toy), Outcome.SOLVED, float(success), success, 0)  # type: ignore[arg-type]


def test_the_best_success_is_the_shortest_and_of_equals_the_newest() -> None:
    task = Task("a", "toy", "train")
    best = BestSuccesses()
    long, short, again, failed = fake(task, 5, True), fake(task, 3, True), fake(task, 3, True), fake(task, 1, False)
    for trajectory, expected in ((failed, None), (long, long), (short, short), (long, short), (again, again)):
        best.update([Group(task, (trajectory,))])
        assert best.of("a") is expected


def test_nothing_of_an_evaluation_task_is_imitated() -> None:
    task = Task("a", "toy", "test")
    with pytest.raises(HeldOutTaskError):
        BestSuccesses().update([Group(task, (fake(task, 1, True),))])


def test_a_resumed_run_imitates_what_it_would_have(make_run: MakeRun) -> None:
    straight = make_run("straight", method="grpo-imitation")
    go(straight)

    first = make_run("first", method="grpo-imitation")
    asyncio.run(train(first, Listener(), lambda: first.iteration == 3))
    second = make_run("second", method="grpo-imitation")

    async def go_on() -> None:
        newest = checkpoint.latest(first.folder)
        assert newest is not None
        checkpoint.load(second, newest)
        await train(second, Listener())

    asyncio.run(go_on())
    assert second.best is not None
    assert straight.best is not None
    assert second.best.state() == straight.best.state() != {}
    for a, b in zip(straight.engine.model.parameters(), second.engine.model.parameters(), strict=True):  # type: ignore[attr-defined]
        assert torch.equal(a, b)
