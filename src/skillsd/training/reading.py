"""Reading: whether the model does what a skill in its prompt says.

A teacher that shares the student's weights can go deaf to its prompt. It then agrees with the student whatever the
skill says, and L_SDL is 0, as it is once a skill is internalised (docs/results/skills.md). So reading is measured in
training. It can be kept up by groups that act with a skill in their own prompt, by replayed demonstrations, or by
leaving out a sync (``teacher.min_reading``). None of this is in the paper.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from skillsd.engines.base import TrainItem, Weights
from skillsd.objective import ACTION_MASK, IMITATION_MASK, TEACHER_MASK
from skillsd.prompting.templates import render_skill
from skillsd.rollouts.collect import Collected, collect
from skillsd.seeds import derive_seed
from skillsd.training.contexts import context_of
from skillsd.training.rollouts import TeacherContext
from skillsd.types import TRAIN_SPLIT, Demonstration, Task
from skillsd.warm_start.sft import make_item

if TYPE_CHECKING:
    from skillsd.training.run import Run

# -- measured -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Success told the task's skill, and told a wrong one."""

    told: float
    misled: float

    @property
    def gap(self) -> float:
        return self.told - self.misled

    def figures(self, prefix: str = "reading") -> dict[str, float]:
        return {f"{prefix}/told": self.told, f"{prefix}/misled": self.misled, f"{prefix}/gap": self.gap}


def is_measured(run: Run) -> bool:
    """Whether the teacher's reading is measured: it has a context, and the engine can sample from its weights."""
    can_sample = _teachers_weights(run) == "student" or run.engine.capabilities.teacher_sampling
    return run.config.measures_reading and can_sample


async def measure_reading(run: Run, weights: Weights | None = None) -> Reading | None:
    """Play training tasks with their skill in the prompt, and with a wrong one. Nothing is trained or recorded.

    The episodes count in ``run.totals``.

    Args:
        weights: whose. Default: the teacher's.

    Returns:
        None if no task has a skill yet, or no wrong one can be told.
    """
    config = run.config
    chosen = list(itertools.islice(_prompts(run), config.reading.episodes))
    if not chosen:
        return None
    policy = replace(run.student, weights=weights or _teachers_weights(run))

    async def play(told: str, contexts: Sequence[str]) -> Collected:
        return await collect(
            policy,
            run.task_set,
            [task for task, _, _ in chosen],
            run.budget,
            group_size=1,
            seed=derive_seed(config.seed, "reading", run.iteration, policy.weights, told),
            retries=config.rollout.retries,
            concurrency=config.rollout.concurrency,
            contexts=contexts,
        )

    told, misled = await asyncio.gather(
        play("told", [told for _, told, _ in chosen]), play("misled", [wrong for _, _, wrong in chosen])
    )
    run.totals["episodes"] += len(told.groups) + len(misled.groups)
    if not told.groups or not misled.groups:
        return None
    return Reading(_success(told), _success(misled))


async def may_sync(run: Run) -> tuple[bool, dict[str, float]]:
    """Whether a synchronised teacher takes the student's weights at a sync that is due, and metrics.

    With ``teacher.min_reading`` it does not if the student reads worse than this share of the first teacher. Before
    any task has a skill, there is nothing to read.
    """
    least = run.config.teacher.min_reading
    if least is None:
        return True, {}
    student = await measure_reading(run, "student") if run.iteration else None
    if student is None:
        return True, {}
    if "first" not in run.reading and (first := await measure_reading(run, "teacher")):
        run.reading["first"] = first.gap
    good = student.gap >= least * run.reading.get("first", 0.0)
    return good, {**student.figures("reading/student"), "reading/synced": float(good)}


def _teachers_weights(run: Run) -> Weights:
    """A teacher without weights of its own is the student."""
    return "teacher" if run.has_own_teacher else "student"


def _prompts(run: Run) -> Iterator[tuple[Task, str, str]]:
    """Tasks in random order with their context and a wrong one; each as often as needed, endless unless empty."""
    every = [(task, context_of(run, task).text) for task in run.curriculum.tasks]
    known = [(task, text) for task, text in every if text]
    order = random.Random(derive_seed(run.config.seed, "reading", run.iteration))
    order.shuffle(known)
    others = [text for _, text in known[1:] + known[:1]]
    found = []
    for (task, text), other in zip(known, others, strict=True):
        skill = run.task_set.wrong_skill(task)
        wrong = render_skill(skill, run.template) if skill else other
        if wrong != text and run.renderer.count(wrong) <= run.config.skills.teacher_extra_tokens:
            found.append((task, text, wrong))
    return itertools.cycle(found)


def _success(collected: Collected) -> float:
    every = [trajectory.success for group in collected.groups for trajectory in group.trajectories]
    return sum(every) / len(every)


# -- kept up --------------------------------------------------------------------------------------------------------


def add_readers(run: Run, tasks: list[Task], number: int) -> dict[str, TeacherContext]:
    """The contexts of the iteration's groups that act with a skill in their own prompt (``reading.share``): of practice
    tasks, which are added to `tasks`, or of some of its tasks, with the bank's skill."""
    options = run.config.reading
    made: dict[str, TeacherContext] = {}
    if not options.share:
        return made
    if options.source == "practice":
        for place in range(run.config.practice_groups):
            task, skill = run.task_set.practice(seed=derive_seed(run.config.seed, "practice", number, place))
            made[task.id] = TeacherContext(text=render_skill(skill, run.template), reading=True)
            tasks.append(task)
        return made
    known = [(task, context) for task in tasks if (context := context_of(run, task)).text]
    order = random.Random(derive_seed(run.config.seed, "readers", number))
    order.shuffle(known)
    count = min(len(known), round(options.share * len(tasks)))
    return {task.id: replace(context, reading=True) for task, context in known[:count]}


def replayed(run: Run) -> list[TrainItem]:
    """Demonstrations of the warm start with a skill in the prompt, to be trained on again."""
    count = run.config.reading.replay
    if not count:
        return []
    seed = derive_seed(run.config.seed, "replay", run.iteration)
    stream = (d for d in run.task_set.demonstrations(TRAIN_SPLIT, seed=seed) if d.skill is not None)
    return [_item(run, demonstration) for demonstration in itertools.islice(stream, count)]


def _item(run: Run, demonstration: Demonstration) -> TrainItem:
    made = make_item(demonstration, run.renderer, run.template, observation_weight=0.0)
    count = made.sequence.marked
    return replace(
        made,
        signals={
            "old_logprobs": torch.zeros(count),
            "advantages": torch.zeros(count),
            "teacher_logprobs": torch.zeros(count),
            ACTION_MASK: torch.zeros(count, dtype=torch.bool),
            TEACHER_MASK: torch.zeros(count, dtype=torch.bool),
            IMITATION_MASK: torch.ones(count, dtype=torch.bool),
        },
    )
