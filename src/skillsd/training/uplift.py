"""What a skill is worth: success with it in the actor's prompt, minus success without, on the skill's own task.

Training tasks only, as everything that touches a skill. Nothing is trained and nothing is recorded in the bank.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from skillsd.envs.base import TaskSet
from skillsd.rollouts.collect import collect
from skillsd.rollouts.episode import Budget, Player
from skillsd.seeds import derive_seed
from skillsd.skills.bank import HeldOutTaskError, StoredSkill
from skillsd.training.evaluate import mean_interval
from skillsd.types import TRAIN_SPLIT, Group, Skill, Task, Trajectory

# -- the measure ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uplift:
    """One context's worth on one task.

    Attributes:
        place: which of the pairs (task, context) that were asked for.
        told_success, plain_success: share of episodes with full success, with the context in the prompt and without.
            ``plain_success`` is nan where only the plain prompt's score was given.
        told_score, plain_score: mean score, i.e. reward.
        episodes: with the context.
    """

    place: int
    task_id: str
    told_success: float
    plain_success: float
    told_score: float
    plain_score: float
    episodes: int

    @property
    def success(self) -> float:
        return self.told_success - self.plain_success

    @property
    def score(self) -> float:
        return self.told_score - self.plain_score


async def measure_uplift(
    actor: Player,
    task_set: TaskSet,
    told: Sequence[tuple[Task, str]],
    budget: Budget,
    *,
    episodes: int,
    seed: int,
    concurrency: int = 256,
    retries: int = 2,
    plain: Mapping[str, float] | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> list[Uplift]:
    """Play each task of `told` with its context in the prompt and without, `episodes` times each.

    The plain prompt is played once per task, whatever the number of its contexts; so is a context that comes up twice.
    Seeds depend on the task and the context alone: a pair's figures are the same whatever else is measured with it
    (but for rounding in the engine). In an environment with chance of its own, the two sides play different episodes.

    Args:
        told: a training task and a rendered skill each.
        budget: of the plain prompt; the context's tokens come on top.
        concurrency: the most episodes under way at once.
        plain: mean score under the plain prompt by task id, where it is known already: it is not played then.

    Returns:
        In the order of `told`. A pair is left out if the infrastructure broke an episode of either side for good, so
        ``len(told) - len(result)`` were lost; `Uplift.place` says which is which.

    Raises:
        HeldOutTaskError: for a task that is not a training task; nothing is played then.
    """
    _guard(task_set, (task for task, _ in told))
    known = plain or {}
    wanted: dict[tuple[str, str], Task] = {}
    for task, context in told:
        if task.id not in known:
            wanted[task.id, ""] = task
        wanted[task.id, context] = task
    slots = asyncio.Semaphore(max(1, concurrency // episodes))

    async def play(task: Task, context: str) -> Group | None:
        async with slots:
            collected = await collect(
                actor,
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
        raise failures.exceptions[0] from None  # the engine's, for all alike: see `collect`
    groups = {key: group for key, done in plays.items() if (group := done.result()) is not None}
    without = {id_: (_success(group), _mean(group.rewards)) for (id_, context), group in groups.items() if not context}
    without |= {id_: (math.nan, score) for id_, score in known.items()}
    measured: list[Uplift] = []
    for place, (task, context) in enumerate(told):
        with_it = groups.get((task.id, context))
        if with_it is None or task.id not in without:
            continue
        success, score = without[task.id]
        measured.append(
            Uplift(place, task.id, _success(with_it), success, _mean(with_it.rewards), score, episodes=episodes)
        )
    return measured


def _guard(task_set: TaskSet, tasks: Iterator[Task]) -> None:
    held_out = {task.id for split in task_set.splits if split != TRAIN_SPLIT for task in task_set.tasks(split)}
    for task in tasks:
        if task.split != TRAIN_SPLIT or task.id in held_out:
            raise HeldOutTaskError(
                f"task {task.id!r} of {task.env!r} is of split {task.split!r}, or in an evaluation split too: skills "
                "are measured on training tasks only"
            )


def _success(group: Group) -> float:
    return _mean([float(trajectory.success) for trajectory in group.trajectories])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# -- many skills ----------------------------------------------------------------------------------------------------

Measured = Sequence[tuple[StoredSkill, Uplift]]


@dataclass(frozen=True)
class UpliftSummary:
    """Uplift over many skills. Each *task* weighs the same, however many skills it has, and is the unit of the
    intervals: a task's skills share its plain episodes and its difficulty, so they are not independent.

    Attributes:
        skills, tasks: how many.
        told, plain: success with a skill and without, mean over tasks of the mean over the task's skills.
        success, success_interval: told - plain, with its 95 % interval (Student's t over tasks).
        score, score_interval: the same of the mean score.
        better, worse: share of the skills with uplift above and below 0. Chance alone puts many of worthless ones on
            either side when a skill is played a few times only.
    """

    skills: int
    tasks: int
    told: float
    plain: float
    success: float
    success_interval: tuple[float, float]
    score: float
    score_interval: tuple[float, float]
    better: float
    worse: float


def summarise_uplift(measured: Measured) -> UpliftSummary:
    """The figures of several skills together."""
    by_task: dict[str, list[Uplift]] = {}
    for _, uplift in measured:
        by_task.setdefault(uplift.task_id, []).append(uplift)

    def over_tasks(figure: Callable[[Uplift], float]) -> list[float]:
        return [_mean([figure(uplift) for uplift in uplifts]) for uplifts in by_task.values()]

    success, score = over_tasks(lambda u: u.success), over_tasks(lambda u: u.score)
    return UpliftSummary(
        skills=len(measured),
        tasks=len(by_task),
        told=_mean(over_tasks(lambda u: u.told_success)),
        plain=_mean(over_tasks(lambda u: u.plain_success)),
        success=_mean(success),
        success_interval=_difference_interval(success),
        score=_mean(score),
        score_interval=_difference_interval(score),
        better=_mean([float(uplift.success > 0) for _, uplift in measured]),
        worse=_mean([float(uplift.success < 0) for _, uplift in measured]),
    )


def by_kind(measured: Measured) -> dict[str, list[tuple[StoredSkill, Uplift]]]:
    """By how the source trajectory ended, and by which of its fields the skill has."""
    kinds: dict[str, list[tuple[StoredSkill, Uplift]]] = {}
    for title in (lambda s: f"from {s.source_outcome.value}", lambda s: _says(s.skill)):
        for stored, uplift in sorted(measured, key=lambda pair: title(pair[0])):
            kinds.setdefault(title(stored), []).append((stored, uplift))
    return kinds


def _says(skill: Skill) -> str:
    if skill.golden_workflow:
        return "workflow and mistake" if skill.mistake_analysis else "workflow only"
    return "mistake only" if skill.mistake_analysis else "neither workflow nor mistake"


def _difference_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of differences, each in [-1, 1]: halved and shifted, they are values in [0, 1]."""
    low, high = mean_interval([(value + 1) / 2 for value in values])
    return (2 * low - 1, 2 * high - 1)
