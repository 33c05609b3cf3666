"""The section ``reading``: the measurement, what keeps reading up, and the sync that waits for it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from toy_env import Toy
from toy_run import Listener, MakeRun, go, without_clocks

from skillsd.engines.base import TokenSequence
from skillsd.errors import UserError
from skillsd.rollouts.collect import Collected
from skillsd.skills.bank import Bank
from skillsd.training import checkpoint, loop, reading
from skillsd.training.loop import train
from skillsd.training.run import Run
from skillsd.types import Demonstration, DemonstrationTurn, Group, Message, Outcome, Skill, Task, Trajectory


class Reader(Toy):
    """The toy with all that the section ``reading`` can ask of an environment. A skill names its task."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self._wrong = wrong
        self.write = lambda trajectory: Skill("", "", f"of {trajectory.task.id}")

    def wrong_skill(self, task: Task) -> Skill | None:
        return Skill("", "", f"not of {task.id}") if self._wrong else None

    def practice(self, *, seed: int) -> tuple[Task, Skill]:
        task = Task(f"practice-{seed}", "toy", "train", {"target": "Up", "loses": "Down"})
        return task, Skill("", "", "Up always")

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        prompt = (Message("user", "Sokoban: #r1c1 @r2c2"),)
        turns = (DemonstrationTurn("Down", "@r1c2", learn=False), DemonstrationTurn("Up", "Solved"))
        for number in itertools.count():
            yield Demonstration(Task("d", "toy", "train"), prompt, turns, Skill("", "", "Up") if number % 2 else None)


def played(task: Task, success: bool) -> Group:
    trajectory = Trajectory(
        task=task,
        prompt=(),
        tokens=(),
        action_mask=(),
        logprobs=(),
        prompt_length=0,
        turns=(),
        outcome=Outcome.SOLVED if success else Outcome.FAILED,
        reward=float(success),
        success=success,
        seed=0,
    )
    return Group(task, (trajectory,))


def read_like(monkeypatch: pytest.MonkeyPatch, told: float, misled: float) -> list[tuple[str, str, str]]:
    """Let measured episodes succeed with these shares; returns the played (weights, task, context) as they come."""
    seen: list[tuple[str, str, str]] = []

    async def collect(policy: Any, task_set: Any, tasks: Any, *args: Any, contexts: Any, **options: Any) -> Collected:
        pairs = list(zip(tasks, contexts, strict=True))
        seen.extend((policy.weights, task.id, context) for task, context in pairs)
        right = f" Workflow: of {tasks[0].id}" == contexts[0]
        solved = (told if right else misled) * len(tasks)
        return Collected([played(task, place < solved) for place, task in enumerate(tasks)])

    monkeypatch.setattr(reading, "collect", collect)
    return seen


def with_skills(run: Run) -> Run:
    """Give every training task a skill."""
    for task in run.curriculum.tasks:
        skill = Skill("", "", f"of {task.id}")
        run.bank.add(task, skill, source=task.id, iteration=0, reward=0.0, outcome=Outcome.FAILED)
    return run


# -- measured -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [False, True])
def test_each_task_is_told_its_own_skill_and_a_wrong_one(
    wrong: bool, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_skills(make_run(toy=Reader(wrong), reading={"episodes": 10}))
    seen = read_like(monkeypatch, told=0.8, misled=0.1)
    before = run.bank.counts()
    found = asyncio.run(reading.measure_reading(run))
    assert found is not None
    assert (found.told, found.misled, found.gap) == (0.8, 0.1, pytest.approx(0.7))
    assert run.totals["episodes"] == 20
    assert run.bank.counts() == before
    told, misled = seen[:10], seen[10:]
    assert [task for _, task, _ in told] == [task for _, task, _ in misled]
    assert len({task for _, task, _ in told}) == 7  # all tasks, then some again
    assert all(context == f" Workflow: of {task}" for _, task, context in told)
    assert all(context != f" Workflow: of {task}" for _, task, context in misled)
    if wrong:
        assert all(context == f" Workflow: not of {task}" for _, task, context in misled)
    assert {weights for weights, _, _ in seen} == {"student"}  # which is what a teacher without its own weights has


def test_a_teacher_of_its_own_is_measured_with_its_own_weights(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_skills(make_run(toy=Reader(), method="skill-sd-frozen"))
    seen = read_like(monkeypatch, 1, 0)
    asyncio.run(reading.measure_reading(run))
    assert {weights for weights, _, _ in seen} == {"teacher"}


def test_reading_is_a_metric_every_few_iterations_and_costs_episodes(make_run: MakeRun) -> None:
    records = go(make_run(toy=Reader(), reading={"every": 2, "episodes": 3})).iterations
    measured = [record["iteration"] for record in records if "reading/gap" in record]
    assert measured == [2, 4, 6]
    assert records[-1]["episodes"] == 6 * 12 + 3 * 6
    for record in records:
        if "reading/gap" in record:
            assert record["reading/gap"] == pytest.approx(record["reading/told"] - record["reading/misled"])
    assert not any("reading/gap" in record for record in go(make_run("grpo", method="grpo")).iterations)


def test_the_measurement_changes_nothing_that_is_trained(make_run: MakeRun) -> None:
    plain, measured = make_run("plain", toy=Reader(), reading={"every": 0}), make_run("m", toy=Reader())
    go(plain), go(make_run("measured", toy=Reader(), reading={"every": 1, "episodes": 2}))
    assert measured.config.reading.every == 10
    with Bank(plain.folder / "skills.sqlite") as one, Bank(plain.folder.with_name("measured") / "skills.sqlite") as two:
        assert one.skills() == two.skills()


# -- the sync that waits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "synced"), [(0.5, 1.0), (0.3, 0.0)])
def test_a_sync_is_left_out_while_the_student_reads_too_badly(
    student: float, synced: float, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_skills(
        make_run(toy=Reader(), teacher={"min_reading": 0.5, "sync_every": 2}, reading={"every": 0, "episodes": 10})
    )

    async def measure(run: Run, weights: str | None = None) -> reading.Reading:
        return reading.Reading(0.9 if weights == "teacher" else student, 0.0)

    monkeypatch.setattr(reading, "measure_reading", measure)
    rates: list[float] = []
    sync = run.learner.sync_teacher

    async def watch(rate: float = 1.0) -> None:
        rates.append(run.iteration)
        await sync(rate)

    monkeypatch.setattr(run.learner, "sync_teacher", watch)
    records = go(run).iterations
    assert run.reading == {"first": 0.9}
    assert [r["reading/synced"] for r in records if "reading/synced" in r] == [synced, synced]  # iterations 3 and 5
    assert rates == ([0, 2, 4] if synced else [0])


# -- kept up ----------------------------------------------------------------------------------------------------------


def watch_batches(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """Filled while `run` trains: (groups, contexts, batch) of each iteration."""
    seen: list[tuple[Any, Any, Any]] = []
    build = loop.build_batch

    async def watch(groups: Any, contexts: Any, *rest: Any, **options: Any) -> Any:
        seen.append((groups, contexts, await build(groups, contexts, *rest, **options)))
        return seen[-1][2]

    monkeypatch.setattr(loop, "build_batch", watch)
    return seen


def test_practice_groups_act_and_train_with_their_skill_and_leave_no_other_trace(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Reader()
    run = make_run(toy=toy, reading={"share": 0.34, "every": 0})
    seen = watch_batches(run, monkeypatch)
    records = go(run).iterations
    prompt = run.renderer.prompt((Message("user", "Sokoban: #r0c0 @r0c0"),), " Workflow: Up always")
    for groups, contexts, batch in seen:
        drilled = [place for place, group in enumerate(groups) if group.task.id.startswith("practice-")]
        assert len(groups) == 3
        assert len(drilled) == 1
        for place in drilled:
            assert contexts[place].student == contexts[place].sampler == " Workflow: Up always"
            assert contexts[place].teacher is None
            assert not batch.taught[place]
            for item, trajectory in zip(batch.groups[place], groups[place].trajectories, strict=True):
                assert item.sequence == TokenSequence(trajectory.tokens, trajectory.action_mask)
                assert len(trajectory.tokens[: trajectory.prompt_length]) == len(prompt)
    assert len({group.task.id for groups, _, _ in seen for group in groups if "practice" in group.task.id}) == 6
    assert not any("practice" in skill.task_id for skill in run.bank.skills())
    assert not any("practice" in trajectory.task.id for trajectory in toy.summarised)
    for (groups, _, _), record in zip(seen, records, strict=True):
        kept = [t for g in groups if "practice" in g.task.id for t in g.trajectories]
        plain = [t for g in groups if "practice" not in g.task.id for t in g.trajectories]
        assert record["reading/kept_up"] == sum(t.success for t in kept) / 4
        assert record["rollout/accuracy"] == sum(t.success for t in plain) / 8
        assert record["episodes"] == 12 * record["iteration"]


def test_readers_of_the_bank_are_neither_taught_nor_counted_as_picks(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Reader()
    run = with_skills(make_run(toy=toy, reading={"share": 0.34, "source": "bank", "every": 0}))
    seen = watch_batches(run, monkeypatch)
    records = go(run).iterations
    readers = taught = 0
    for groups, contexts, batch in seen:
        for group, context, has_teacher in zip(groups, contexts, batch.taught, strict=True):
            reads = context.student != ""
            readers, taught = readers + reads, taught + has_teacher
            own = f" Workflow: of {group.task.id}"
            assert (context.sampler, context.student, context.teacher) == ((own, own, None) if reads else ("", "", own))
            assert has_teacher is not reads
    assert (readers, taught) == (6, 12)
    assert run.bank.counts()["picks"] == 12
    assert run.bank.counts()["credited"] == 12 * 4
    assert records[-1]["batch/groups_with_teacher"] == pytest.approx(2 / 3)
    assert len(toy.summarised) == 12 * 4


def test_replayed_demonstrations_are_imitated_with_their_skill(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(toy=Reader(), reading={"replay": 5, "replay_weight": 0.3, "every": 0}, training={"minibatches": 1})
    seen = watch_batches(run, monkeypatch)
    demonstration = next(d for d in Reader().demonstrations("train", seed=0) if d.skill)
    prompt = run.renderer.prompt(demonstration.prompt, " Workflow: Up")
    first = run.renderer.reply("Down")
    middle = run.renderer.observation("@r1c2", first[-1])
    last = run.renderer.reply("Up")
    tokens = (*prompt, *first, *middle, *last)
    expected = TokenSequence(tokens, (*[False] * (len(tokens) - len(last)), *[True] * len(last)))
    [scored] = asyncio.run(run.learner.logprobs([expected], temperature=1.0))  # before the first update
    record = go(run).iterations[0]
    batch = seen[0][2]
    items = [item for group in batch.groups for item in group if not item.signals["action_mask"].any()]
    assert len(items) == 5
    assert all(item.sequence == expected for item in items)
    assert record["loss/imitation_loss"] == pytest.approx(-float(scored.chosen.mean()), rel=1e-5)
    assert run.objective().imitation_weight == 0.3


def test_a_run_with_all_of_it_resumes_bit_for_bit(make_run: MakeRun) -> None:
    sections: dict[str, Any] = {
        "reading": {"every": 2, "episodes": 2, "share": 0.34, "replay": 2},
        "teacher": {"min_reading": 0.9, "sync_every": 2},
        "skills": {"credit": "change", "per_group": 2, "pick": "ucb-prior"},
        "training": {"iterations": 8},
    }
    whole = go(make_run("whole", toy=Reader(), **sections))
    first, stopped = make_run("parts", toy=Reader(), **sections), Listener()
    asyncio.run(train(first, stopped, should_stop=lambda: first.iteration == 5))
    second, rest = make_run("parts-again", toy=Reader(), **sections), Listener()

    async def resume() -> None:
        await checkpoint.load(second, checkpoint.find(first.folder))
        await train(second, rest)

    asyncio.run(resume())
    assert without_clocks(stopped.iterations + rest.iterations) == without_clocks(whole.iterations)
    assert second.taught  # the credit that is still to come was among what was restored


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"method": "skill-grpo", "reading": {"share": 0.3}}, "the sampling policy's prompt has a context"),
        ({"method": "grpo", "reading": {"share": 0.3, "source": "bank"}}, "has no skills"),
        ({"reading": {"share": 0.1}}, "0 of 3 groups"),
        ({"reading": {"share": 0.9}}, "3 of 3 groups"),
        ({"method": "grpo-imitation", "reading": {"replay": 3}}, "the same loss term"),
        ({"method": "skill-sd-frozen", "teacher": {"min_reading": 0.5}}, "is not synchronised"),
    ],
)
def test_settings_that_do_not_fit(sections: dict[str, Any], expected: str, make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=expected):
        make_run(toy=Reader(), **sections)


def test_an_environment_without_practice_tasks_is_refused_before_anything_starts(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="'toy' has no practice tasks"):
        make_run(toy=Toy(), reading={"share": 0.34})


def test_practice_without_a_teacher_is_the_control(make_run: MakeRun) -> None:
    """GRPO with the same practice: without a bank or a teacher."""
    records = go(make_run(toy=Reader(), method="grpo", reading={"share": 0.34})).iterations
    assert all("reading/kept_up" in record for record in records)
    assert torch.isfinite(torch.tensor(records[-1]["loss/policy_loss"]))
