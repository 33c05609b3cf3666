"""The two phases of an iteration, called by hand, and the versions of the weights that sampled."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch
from toy_run import Listener, MakeRun, go, without_clocks

from skillsd.rollouts.records import trajectory_from_json, trajectory_to_json
from skillsd.training.loop import learn_phase, rollout_phase
from skillsd.training.rollouts import Rollouts
from skillsd.training.run import Run


async def train_by_hand(run: Run, listener: Listener) -> None:
    await run.engine.publish()
    for number in range(run.config.training.iterations):
        rollouts = await rollout_phase(run, number, listener)
        listener.iteration(await learn_phase(run, rollouts, listener))


def weights(run: Run) -> dict[str, torch.Tensor]:
    learner: Any = run.learner
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


@pytest.mark.parametrize("method", ["grpo", "skill-sd", "skill-grpo", "teacher-rollouts"])
def test_phases_by_hand_equal_train(make_run: MakeRun, method: str) -> None:
    settings = {"method": method, "evaluation": {"every": 0}, "training": {"iterations": 4}}
    whole = make_run("whole", **settings)
    expected = go(whole)
    by_hand, listener = make_run("by-hand", **settings), Listener()
    asyncio.run(train_by_hand(by_hand, listener))
    assert without_clocks(listener.iterations) == without_clocks(expected.iterations)
    assert listener.groups == expected.groups
    assert by_hand.bank.skills() == whole.bank.skills()
    assert by_hand.visits == whole.visits
    ours, theirs = weights(by_hand), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rollout_phase_changes_no_weights(make_run: MakeRun) -> None:
    run, listener = make_run(), Listener()
    before = weights(run)
    rollouts = asyncio.run(rollout_phase(run, 0, listener))
    assert (rollouts.iteration, run.iteration, run.learner.version) == (0, 0, 0)
    assert [len(group.trajectories) for group in rollouts.groups] == [4, 4, 4]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())
    assert listener.groups == []


def test_contexts_are_selected_before_the_rollouts_only_if_the_sampler_sees_them(make_run: MakeRun) -> None:
    async def last_rollouts(run: Run) -> Rollouts:
        await train_by_hand(run, Listener())
        return await rollout_phase(run, run.iteration, Listener())

    before = asyncio.run(last_rollouts(make_run("before", method="skill-grpo", training={"iterations": 3})))
    assert set(before.contexts) == {group.task.id for group in before.groups}
    after = asyncio.run(last_rollouts(make_run("after", training={"iterations": 3})))
    assert after.contexts == {}


# -- versions -------------------------------------------------------------------------------------------------------


def test_policy_lag_is_zero_in_synchronous_training(make_run: MakeRun) -> None:
    listener = go(make_run(training={"epochs": 2}))
    assert [record["rollout/policy_lag"] for record in listener.iterations] == [0.0] * 6


def test_trajectories_carry_the_version_that_sampled_them(make_run: MakeRun) -> None:
    """Two minibatches are two updates per iteration."""
    listener = go(make_run())
    versions = [{t.versions for g in listener.groups[i : i + 3] for t in g.trajectories} for i in range(0, 18, 3)]
    assert versions == [{(2 * i, 2 * i)} for i in range(6)]


def test_records_keep_versions(make_run: MakeRun) -> None:
    for group in go(make_run(training={"iterations": 2})).groups:
        for trajectory in group.trajectories:
            back = trajectory_from_json(json.loads(json.dumps(trajectory_to_json(trajectory))))
            assert back == trajectory
            assert isinstance(back.versions, tuple)


def test_training_on_older_rollouts_has_a_policy_lag(make_run: MakeRun) -> None:
    run, listener = make_run(), Listener()

    async def twice() -> list[float]:
        rollouts = await rollout_phase(run, 0, listener)
        records = [await learn_phase(run, rollouts, listener)]
        await run.learner.sync_teacher()
        records.append(await learn_phase(run, rollouts, listener))
        return [record["rollout/policy_lag"] for record in records]

    assert asyncio.run(twice()) == [0.0, 2.0]


def test_resume_keeps_the_version(make_run: MakeRun) -> None:
    from skillsd.training import checkpoint

    run = make_run("first")
    go(run)
    other = make_run("second")
    asyncio.run(checkpoint.load(other, checkpoint.find(run.folder)))
    assert other.learner.version == run.learner.version == 12


def test_the_sampler_sleeps_from_the_last_sample_to_the_new_weights(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(
        skills={"credit": "uplift", "uplift_episodes": 2}, training={"iterations": 4}, evaluation={"every": 1}
    )
    events: list[str] = []

    def watch(name: str) -> None:
        call = getattr(run.engine.sampler, name)

        async def watched(*args: Any, **options: Any) -> Any:
            events.append(name)
            return await call(*args, **options)

        monkeypatch.setattr(run.engine.sampler, name, watched)

    for name in ("sample", "sleep", "logprobs", "forward_backward", "load"):
        watch(name)
    go(run)
    awake = True
    for event in events:
        awake = {"sleep": False, "load": True}.get(event, awake)
        assert awake == (event in ("sample", "load")), event
    assert [event for event in events if event in ("sleep", "load")] == ["load", *["sleep", "load"] * 4]
