"""Many episodes at once: groups of G per task. Episodes lost to infrastructure failures are played again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from skillsd.envs.base import TaskSet
from skillsd.envs.checked import EnvironmentFaultError, checked
from skillsd.rollouts.episode import run_episode
from skillsd.rollouts.policy import Budget, Policy
from skillsd.seeds import derive_seed
from skillsd.types import Group, Outcome, Task, Trajectory


@dataclass
class Collected:
    """The result of a collection.

    Attributes:
        groups: complete groups only, in the order of the tasks.
        infra_failures: outcome -> number of episodes lost to an infrastructure failure, retried ones included.
        reason: the last failure's error message.
        dropped: tasks whose group was dropped because one of its episodes failed in every attempt.
    """

    groups: list[Group] = field(default_factory=list)
    infra_failures: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    dropped: list[Task] = field(default_factory=list)


async def collect(
    policy: Policy,
    task_set: TaskSet,
    tasks: Sequence[Task],
    budget: Budget,
    *,
    group_size: int,
    seed: int,
    retries: int = 2,
    concurrency: int = 256,
    contexts: Sequence[str] | None = None,
    finished: Mapping[int, Trajectory] | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> Collected:
    """Play every task `group_size` times.

    An episode with the outcome ``env_error`` or ``timeout`` is played again, in a new environment, up to `retries`
    times. If it still has no reward, its whole group is dropped: an infrastructure failure never counts as reward 0,
    and a smaller group would change the group statistics.

    Args:
        seed: all episodes' seeds are derived from it by name, so they do not depend on the order of execution.
        concurrency: the maximum number of episodes in progress.
        contexts: text added to the policy's first prompt, one per task.
        finished: seed -> episode, from an interrupted run of this same collection; these are not played again.
        on_episode: called for each new episode that carries a reward, in order of completion.

    Raises:
        Exception: whatever the policy raises, other than `PolicyFailedError`.
        UserError: if an environment can't be made on this machine.
    """
    collected, environments = Collected(), checked(task_set)
    slots = asyncio.Semaphore(concurrency)

    def failed(outcome: Outcome, reason: str) -> None:
        collected.infra_failures[outcome] = collected.infra_failures.get(outcome, 0) + 1
        collected.reason = reason

    async def play(task: Task, place: int, member: int) -> Trajectory | None:
        # `place` distinguishes two visits to one task in the same collection.
        seeds = [derive_seed(seed, place, task.id, member, attempt) for attempt in range(retries + 1)]
        for episode_seed in seeds:
            if finished and episode_seed in finished:
                return finished[episode_seed]
        for attempt, episode_seed in enumerate(seeds):
            name = f"{seed}/{place}/{task.id}/{member}/{attempt}"
            async with slots:
                try:
                    environment = environments.make()
                except EnvironmentFaultError as error:  # an infrastructure failure, like one in `reset` or `step`
                    failed(Outcome.ENV_ERROR, str(error))
                    continue
                trajectory = await run_episode(
                    policy,
                    environment,
                    task,
                    budget,
                    seed=episode_seed,
                    # One environment seed per group: GRPO compares rewards of the same episode.
                    environment_seed=derive_seed(seed, place, task.id),
                    session=name,
                    context=contexts[place] if contexts else "",
                )
            if trajectory.outcome.has_reward:
                on_episode(trajectory)
                return trajectory
            failed(trajectory.outcome, trajectory.error)
        return None

    try:
        async with asyncio.TaskGroup() as running:
            plays = [
                [running.create_task(play(task, place, member)) for member in range(group_size)]
                for place, task in enumerate(tasks)
            ]
    except ExceptionGroup as failures:
        # An environment's errors don't end up here, so all episodes fail alike, and one error is enough.
        raise failures.exceptions[0] from None
    for task, members in zip(tasks, plays, strict=True):
        trajectories = [member.result() for member in members]
        complete = [trajectory for trajectory in trajectories if trajectory is not None]
        if len(complete) == group_size:
            collected.groups.append(Group(task, tuple(complete)))
        else:
            collected.dropped.append(task)
    return collected


def outcome_counts(groups: Sequence[Group]) -> dict[Outcome, int]:
    """Number of episodes by outcome, zeros included."""
    counts = dict.fromkeys(Outcome, 0)
    for group in groups:
        for trajectory in group.trajectories:
            counts[trajectory.outcome] += 1
    return counts
