"""One training iteration on one page, in the order of the paper's Algorithm 1. No backend, environment or method is
named here: `Run` brings them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from skillsd.errors import UserError
from skillsd.rollouts.collect import collect
from skillsd.seeds import derive_seed
from skillsd.skills.bank import StoredSkill
from skillsd.skills.context import render_skill
from skillsd.training import checkpoint
from skillsd.training.batches import build_batch
from skillsd.training.evaluate import evaluate
from skillsd.training.figures import describe_batch, describe_rollouts, describe_skills, describe_system
from skillsd.training.optimise import optimise
from skillsd.training.run import Run, actor_at
from skillsd.types import Group, Skill, Task

Record = dict[str, Any]


class Reporter(Protocol):
    """Who is told how training goes."""

    def iteration(self, record: Record) -> None: ...

    def evaluation(self, record: Record) -> None: ...

    def trajectories(self, iteration: int, groups: list[Group]) -> None: ...

    def note(self, text: str) -> None: ...


async def train(run: Run, reporter: Reporter, should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Train from wherever `run` is to its last iteration; True if it got there, False if it was asked to stop.

    Either way the last finished iteration is in a checkpoint when this returns.
    """
    config = run.config
    last = config.training.iterations
    saved = run.iteration if checkpoint.latest(run.folder) else None
    if run.iteration == 0 and saved is None:  # a run that was stopped before its first iteration has it already
        reporter.evaluation(await measure(run))
    while run.iteration < last and not should_stop():
        record = await iterate(run, reporter)
        reporter.iteration(record)
        if run.iteration == last or _due(config.evaluation.every, run.iteration):
            reporter.evaluation(await measure(run))
        if run.iteration == last or _due(config.checkpoint.every, run.iteration):
            checkpoint.save(run)
            saved = run.iteration
    if saved != run.iteration:
        checkpoint.save(run)
    return run.iteration >= last


async def iterate(run: Run, reporter: Reporter) -> Record:
    """One iteration of Algorithm 1."""
    config, number, clock = run.config, run.iteration, Stopwatch()

    if run.method.teacher == "synchronised" and number % config.teacher.sync_every == 0:
        run.engine.sync_teacher()
    tasks = run.curriculum.pick(number)

    # The student acts, under the plain prompt.
    with clock("rollout"):
        collected = await collect(
            run.actor,
            run.task_set,
            tasks,
            run.budget,
            group_size=config.rollout.group_size,
            seed=derive_seed(config.seed, "rollout", number),
            retries=config.rollout.retries,
            concurrency=config.rollout.concurrency,
        )
    groups = collected.groups
    if collected.dropped:
        reporter.note(f"{len(collected.dropped)} of {len(tasks)} groups dropped; the environment: {collected.reason}")
    _check_groups(run, groups, collected.reason)

    # The teacher is told more (a skill of each task's own bank), and re-scores what the student said.
    if run.summaries:
        run.summaries.collect()  # what became ready meanwhile
    with run.bank.batch():
        lessons = [_lesson(run, group.task) for group in groups]
    objective = run.objective()
    with clock("teacher"):
        batch = await _compute(
            run,
            lambda: build_batch(
                groups,
                [_told(run, group.task, lesson) for group, lesson in zip(groups, lessons, strict=True)],
                run.engine,
                run.renderer,
                temperature=config.rollout.temperature,
                extra_tokens=config.skills.teacher_extra_tokens,
                scale_by_std=config.objective.scale_by_std,
                distribution=objective.needs_distribution,
            ),
        )

    # L = L_GRPO + lambda * L_SDL
    with clock("update"):
        updated = await _compute(run, lambda: optimise(run, batch, objective, reporter.note))

    # A skill is credited with the rewards of the rollouts that were trained while it taught: not if it did not fit,
    # nor if nothing was updated.
    with run.bank.batch():
        for group, lesson, taught in zip(groups, lessons, batch.taught, strict=True):
            if lesson and taught and updated["step/applied"]:
                run.bank.credit(lesson.id, group.rewards)

    # Finished trajectories become skills, for later iterations.
    with clock("summarise"):
        written = await _summarise(run, groups)

    run.iteration += 1
    run.totals["episodes"] += sum(len(group.trajectories) for group in groups)
    run.totals["sampled_tokens"] += sum(t.action_tokens for group in groups for t in group.trajectories)
    run.totals["seconds"] += clock.total
    reporter.trajectories(run.iteration, groups)
    return {
        "iteration": run.iteration,
        **run.totals,
        **describe_rollouts(collected, clock.seconds["rollout"]),
        **describe_batch(batch),
        **updated,
        **describe_skills(run, written),
        **describe_system(run.engine),
        **{f"time/{phase}": seconds for phase, seconds in clock.seconds.items()},
        "time/iteration": clock.total,
    }


async def measure(run: Run) -> Record:
    """A point of the learning curve: the student under the plain prompt, on tasks that training never sees."""
    options = run.config.evaluation
    record: Record = {"iteration": run.iteration, **run.totals}
    kinds = [("eval", run.config.rollout.temperature, options.samples)]
    if options.greedy:
        kinds.append(("eval_greedy", 0.0, 1))
    for name, temperature, samples in kinds:
        figures = await evaluate(
            actor_at(run, temperature),
            run.task_set,
            options.split,
            run.budget,
            seed=derive_seed(run.config.seed, "evaluation"),
            samples=samples,
            limit=options.limit,
            concurrency=run.config.rollout.concurrency,
        )
        record |= {f"{name}/{key}": value for key, value in figures.as_dict().items()}
    return record


def _check_groups(run: Run, groups: list[Group], reason: str) -> None:
    """A run that never gets anything to train on is told why, instead of ending with nothing learnt.

    Once it had something, a lost iteration is an outage: it changes nothing, is noted, and training goes on.
    """
    if not groups and not run.totals["episodes"]:
        raise UserError(
            f"every episode of iteration {run.iteration + 1} failed in the environment "
            f"{run.config.environment.name!r}, fresh tries included: {reason}"
        )
    if groups and not any(trajectory.turns for group in groups for trajectory in group.trajectories):
        raise UserError(
            f"rollout.trajectory_tokens is {run.config.rollout.trajectory_tokens}, but the prompts alone have "
            f"{groups[0].trajectories[0].prompt_length} tokens: nobody could say anything"
        )


def _lesson(run: Run, task: Task) -> StoredSkill | None:
    return run.bank.pick(task, c=run.config.skills.ucb_c) if run.method.context == "skill" else None


def _told(run: Run, task: Task, lesson: StoredSkill | None) -> str:
    """The teacher's extra context in words; empty where it has none."""
    if run.method.context == "oracle":
        # Worded as a skill's workflow, so that oracle and skill differ in what they say and not in how.
        return render_skill(Skill("", "", run.task_set.oracle(task) or ""), run.template)
    return render_skill(lesson.skill, run.template) if lesson else ""


async def _summarise(run: Run, groups: list[Group]) -> int:
    """Hand all trajectories to the summariser; put what is ready into the bank. Returns how many skills are new."""
    if run.summaries is None:
        return 0
    number = run.iteration + 1  # as metrics.jsonl and the trajectories' files count it
    for group in groups:
        for member, trajectory in enumerate(group.trajectories):
            source = f"iteration-{number}/{group.task.id}/{member}"
            run.summaries.submit(trajectory, source=source, iteration=number)
    if run.config.skills.deterministic:
        await run.summaries.drain()
    else:
        await asyncio.sleep(0)  # let them begin
    return run.summaries.collect()


async def _compute(run: Run, work: Callable[[], Any]) -> Any:
    """Do blocking work; in a thread where summaries are being written meanwhile, so that theirs goes on."""
    if run.summaries is None or run.config.skills.deterministic:
        return work()
    return await asyncio.to_thread(work)


def _due(every: int, iteration: int) -> bool:
    return bool(every) and iteration % every == 0


class Stopwatch:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    @property
    def total(self) -> float:
        return sum(self.seconds.values())
