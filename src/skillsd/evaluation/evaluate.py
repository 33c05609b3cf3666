"""Held-out evaluation: accuracy and completion on a split, with intervals. Uses no skill and changes no weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scipy import stats

from skillsd.envs.base import TaskSet, evenly_spaced
from skillsd.envs.checked import checked
from skillsd.rollouts.collect import collect, outcome_counts
from skillsd.rollouts.policy import Budget, Policy
from skillsd.types import Group, Task, Trajectory


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        accuracy: share of episodes with full success (pass@1).
        interval: 95 % interval of the accuracy over *tasks*: the panel's sampling error, not the training's.
        completion: mean reward, the share of sub-goals reached.
        completion_interval: 95 % interval of the completion over tasks.
        tasks, episodes: number of those that were played. Tasks lost to infrastructure failures are not included.
        mean_turns: mean number of turns per episode.
        seconds: wall-clock time.
        split: the split that was played.
        fingerprint: identifies the panel; results with different fingerprints are not comparable.
        temperature: of sampling; 0 is greedy.
        scenario_accuracy: share of scenarios in which all tasks were solved (AppWorld's SGC), the mean over samples;
            None if the environment's tasks are not grouped into scenarios.
        outcomes: number of episodes by outcome (`skillsd.types.Outcome`), without zeros.
        failure: the last infrastructure failure, if nothing could be played.
        successes, rewards: the mean over each task's episodes, in the panel's order. None for a task lost to
            infrastructure failures.
    """

    accuracy: float
    interval: tuple[float, float]
    completion: float
    completion_interval: tuple[float, float]
    tasks: int
    episodes: int
    mean_turns: float
    seconds: float
    split: str
    fingerprint: str
    temperature: float
    scenario_accuracy: float | None = None
    outcomes: Mapping[str, int] = field(default_factory=dict)
    successes: tuple[float | None, ...] = ()
    rewards: tuple[float | None, ...] = ()
    failure: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The fields that are single numbers or names."""
        figures = {k: v for k, v in self.with_tasks().items() if k not in ("outcomes", "successes", "rewards")}
        if self.scenario_accuracy is None:
            del figures["scenario_accuracy"]
        return figures

    def with_tasks(self) -> dict[str, Any]:
        """All figures, those per task included."""
        figures = asdict(self)
        del figures["failure"]
        return figures


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of `values` in [0, 1].

    For 0/1 values Wilson's interval, whose coverage holds near 0 and 1; otherwise Student's t. For equal values, whose
    deviation says nothing, Wilson's for their mean. (nan, nan) if empty.
    """
    n = len(values)
    if n == 0:
        return (math.nan, math.nan)
    if all(value in (0.0, 1.0) for value in values) or (n > 1 and len(set(values)) == 1):
        return _wilson(sum(values) / n, n)
    return student(values) or (0.0, 1.0)


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927). `share` need not be a multiple of 1 / n."""
    z2 = float(stats.norm.ppf(0.975)) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return (0.0 if share == 0 else centre - reach, 1.0 if share == 1 else centre + reach)


def student(values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t, within `bounds`; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return (max(bounds[0], mean - reach), min(bounds[1], mean + reach))


async def evaluate(
    policy: Policy,
    task_set: TaskSet,
    split: str,
    budget: Budget,
    *,
    seed: int,
    samples: int = 1,
    limit: int | None = None,
    retries: int = 2,
    concurrency: int = 256,
    context: Callable[[Task], str] | None = None,
    finished: Mapping[int, Trajectory] | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> Evaluation:
    """Play every task of `split` `samples` times, at the policy's temperature.

    Args:
        limit: only this many of the split's tasks, evenly spaced.
        context: task -> text added to its first prompt, for studies of a skill's value. By default the student is
            tested under the plain prompt.
        retries, concurrency, finished, on_episode: see `skillsd.rollouts.collect.collect`.
    """
    task_set = checked(task_set)
    tasks = list(evenly_spaced(task_set.tasks(split), limit))
    scenarios = {task.id: task_set.scenario(task) for task in tasks}  # a fault shows before the episodes are played
    begin = time.perf_counter()
    collected = await collect(
        policy,
        task_set,
        tasks,
        budget,
        group_size=samples,
        seed=seed,
        retries=retries,
        concurrency=concurrency,
        contexts=[context(task) for task in tasks] if context else None,
        finished=finished,
        on_episode=on_episode,
    )
    # Episodes of one task are not independent, so the interval is over the tasks' means.
    successes = [sum(t.success for t in g.trajectories) / samples for g in collected.groups]
    rewards = [sum(g.rewards) / samples for g in collected.groups]
    played = {g.task.id: place for place, g in enumerate(collected.groups)}
    places = [played.get(task.id) for task in tasks]
    turns = [len(t.turns) for g in collected.groups for t in g.trajectories]
    return Evaluation(
        accuracy=_mean(successes),
        interval=mean_interval(successes),
        completion=_mean(rewards),
        completion_interval=mean_interval(rewards),
        tasks=len(collected.groups),
        episodes=len(turns),
        mean_turns=_mean(turns),
        seconds=time.perf_counter() - begin,
        split=split,
        fingerprint=task_set.fingerprint(split) + (f":{limit} spread" if limit else ""),
        temperature=policy.temperature,
        scenario_accuracy=_scenario_accuracy(collected.groups, scenarios, samples),
        outcomes={outcome.value: count for outcome, count in outcome_counts(collected.groups).items() if count},
        successes=tuple(None if place is None else successes[place] for place in places),
        rewards=tuple(None if place is None else rewards[place] for place in places),
        failure="" if collected.groups else collected.reason,
    )


def _scenario_accuracy(groups: Sequence[Group], names: Mapping[str, str | None], samples: int) -> float | None:
    scenarios: dict[str, list[Group]] = {}
    for group in groups:
        name = names[group.task.id]
        if name is not None:
            scenarios.setdefault(name, []).append(group)
    if not scenarios:
        return None
    return _mean(
        [
            float(all(group.trajectories[sample].success for group in variants))
            for variants in scenarios.values()
            for sample in range(samples)
        ]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
