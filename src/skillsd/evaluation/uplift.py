"""A skill's uplift: success with the skill in the policy's prompt minus success without it, on the skill's own task.

On training tasks only, as always with skills. Nothing is trained, and nothing is recorded in the bank.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from skillsd.envs.base import TaskSet
from skillsd.envs.checked import checked
from skillsd.evaluation.evaluate import mean_interval
from skillsd.rollouts.collect import collect
from skillsd.rollouts.policy import Budget, Policy
from skillsd.seeds import derive_seed
from skillsd.skills.bank import HeldOutTaskError, StoredSkill
from skillsd.types import TRAIN_SPLIT, Group, Skill, Task, Trajectory

# -- the measure ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uplift:
    """One context's uplift on one task.

    Attributes:
        place: index of the requested pair (task, context).
        success_with, success_without: share of episodes with full success, with and without the context in the prompt.
            ``success_without`` is nan if only the plain prompt's reward is known (`measure_uplift`'s `plain`).
        reward_with, reward_without: mean rewards, with and without the context.
        episodes: number of episodes with the context.
    """

    place: int
    task_id: str
    success_with: float
    success_without: float
    reward_with: float
    reward_without: float
    episodes: int

    @property
    def success(self) -> float:
        return self.success_with - self.success_without

    @property
    def reward(self) -> float:
        return self.reward_with - self.reward_without


async def measure_uplift(
    policy: Policy,
    task_set: TaskSet,
    contexts: Sequence[tuple[Task, str]],
    budget: Budget,
    *,
    episodes: int,
    seed: int,
    concurrency: int = 256,
    retries: int = 2,
    plain: Mapping[str, float] | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> list[Uplift]:
    """Play each task with and without its context in the prompt, `episodes` times each.

    Each task is played under the plain prompt only once, even if it has several contexts, and a repeated pair is played
    once. Seeds depend only on task and context, so a pair's result does not depend on the other pairs (except for
    rounding in the engine). In a stochastic environment the two sides play different episodes.

    Args:
        contexts: pairs of a training task and a rendered skill.
        budget: for the plain prompt; the context's tokens do not count against it.
        concurrency: the maximum number of episodes in progress.
        plain: task id -> mean reward under the plain prompt, if known already; these are not played without a context.

    Returns:
        In the order of `contexts`. A pair is left out if one of its episodes, on either side, failed in every attempt:
        ``len(contexts) - len(result)`` pairs were lost. See `Uplift.place`.

    Raises:
        HeldOutTaskError: for a task that is not a training task; nothing is played then.
    """
    task_set = checked(task_set)
    _guard(task_set, (task for task, _ in contexts))
    known = plain or {}
    wanted: dict[tuple[str, str], Task] = {}
    for task, context in contexts:
        if task.id not in known:
            wanted[task.id, ""] = task
        wanted[task.id, context] = task
    slots = asyncio.Semaphore(max(1, concurrency // episodes))

    async def play(task: Task, context: str) -> Group | None:
        async with slots:
            collected = await collect(
                policy,
                task_set,
                [task],
                budget,
                group_size=episodes,
                seed=derive_seed(seed, "uplift", context),
                retries=retries,
                concurrency=concurrency,
                contexts=[context],
                on_episode=on_episode,
            )
        return collected.groups[0] if collected.groups else None

    try:
        async with asyncio.TaskGroup() as running:
            plays = {key: running.create_task(play(task, key[1])) for key, task in wanted.items()}
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # the same for all, see `collect`
    groups = {key: group for key, done in plays.items() if (group := done.result()) is not None}
    without = {id_: (_success(group), _mean(group.rewards)) for (id_, context), group in groups.items() if not context}
    without |= {id_: (math.nan, reward) for id_, reward in known.items()}
    measured: list[Uplift] = []
    for place, (task, context) in enumerate(contexts):
        with_it = groups.get((task.id, context))
        if with_it is None or task.id not in without:
            continue
        success, reward = without[task.id]
        measured.append(
            Uplift(place, task.id, _success(with_it), success, _mean(with_it.rewards), reward, episodes=episodes)
        )
    return measured


def _guard(task_set: TaskSet, tasks: Iterator[Task]) -> None:
    held_out = {task.id for split in task_set.splits if split != TRAIN_SPLIT for task in task_set.tasks(split)}
    for task in tasks:
        if task.split != TRAIN_SPLIT or task.id in held_out:
            raise HeldOutTaskError(
                f"task {task.id!r} of {task.env!r} is in the split {task.split!r} or also in an evaluation split: "
                "skills are measured on training tasks only"
            )


def _success(group: Group) -> float:
    return _mean([float(trajectory.success) for trajectory in group.trajectories])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# -- many skills ----------------------------------------------------------------------------------------------------

Measured = Sequence[tuple[StoredSkill, Uplift]]


@dataclass(frozen=True)
class UpliftSummary:
    """Uplift over many skills. Each *task* has the same weight and is the unit of the intervals: a task's skills share
    its plain episodes and its difficulty, so they are not independent.

    Attributes:
        skills, tasks: their numbers.
        with_skill, without_skill: success, the mean over tasks of the mean over the task's skills.
        success, success_interval: their difference, with its 95 % interval (Student's t over tasks).
        reward, reward_interval: the same for the mean reward.
        better, worse: share of the skills with uplift above and below 0. With few episodes per skill, many skills
            without effect are on either side by chance.
    """

    skills: int
    tasks: int
    with_skill: float
    without_skill: float
    success: float
    success_interval: tuple[float, float]
    reward: float
    reward_interval: tuple[float, float]
    better: float
    worse: float


def summarise_uplift(measured: Measured) -> UpliftSummary:
    """The summary of pairs of a skill and its uplift."""
    by_task: dict[str, list[Uplift]] = {}
    for _, uplift in measured:
        by_task.setdefault(uplift.task_id, []).append(uplift)

    def over_tasks(figure: Callable[[Uplift], float]) -> list[float]:
        return [_mean([figure(uplift) for uplift in uplifts]) for uplifts in by_task.values()]

    success, reward = over_tasks(lambda u: u.success), over_tasks(lambda u: u.reward)
    return UpliftSummary(
        skills=len(measured),
        tasks=len(by_task),
        with_skill=_mean(over_tasks(lambda u: u.success_with)),
        without_skill=_mean(over_tasks(lambda u: u.success_without)),
        success=_mean(success),
        success_interval=_difference_interval(success),
        reward=_mean(reward),
        reward_interval=_difference_interval(reward),
        better=_mean([float(uplift.success > 0) for _, uplift in measured]),
        worse=_mean([float(uplift.success < 0) for _, uplift in measured]),
    )


def by_kind(measured: Measured) -> dict[str, list[tuple[StoredSkill, Uplift]]]:
    """Pairs grouped by the source trajectory's outcome, and again by which fields the skill has."""
    kinds: dict[str, list[tuple[StoredSkill, Uplift]]] = {}
    for title in (lambda s: f"from {s.source_outcome.value}", lambda s: _fields(s.skill)):
        for stored, uplift in sorted(measured, key=lambda pair: title(pair[0])):
            kinds.setdefault(title(stored), []).append((stored, uplift))
    return kinds


def _fields(skill: Skill) -> str:
    if skill.golden_workflow:
        return "workflow and mistake" if skill.mistake_analysis else "workflow only"
    return "mistake only" if skill.mistake_analysis else "neither workflow nor mistake"


def _difference_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of differences in [-1, 1], computed after mapping them to [0, 1]."""
    low, high = mean_interval([(value + 1) / 2 for value in values])
    return (2 * low - 1, 2 * high - 1)
