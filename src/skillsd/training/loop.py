"""The training loop: an iteration is a rollout phase and a learn phase, with steps numbered as in docs/method.md, after
the paper's Algorithm 1. It does not depend on a particular engine, environment or method: they are parts of the `Run`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from skillsd.errors import UserError
from skillsd.evaluation.evaluate import evaluate
from skillsd.rollouts.collect import Collected, collect
from skillsd.rollouts.groups import RecordedGroup
from skillsd.seeds import derive_seed
from skillsd.training import checkpoint
from skillsd.training.ahead import meanwhile
from skillsd.training.batch import build_batch
from skillsd.training.contexts import commit_contexts, contexts_for, select_contexts
from skillsd.training.credit import credit_skills, values_of
from skillsd.training.metrics import (
    describe_batch,
    describe_rollouts,
    describe_skills,
    describe_system,
)
from skillsd.training.reading import add_readers, is_measured, may_sync, measure_reading, replayed
from skillsd.training.recorded import record_groups
from skillsd.training.rollouts import Rollouts, TeacherContext
from skillsd.training.run import Run
from skillsd.training.update import update
from skillsd.types import Group

Record = dict[str, Any]


class Reporter(Protocol):
    """Receives metrics, notes, and the groups of the iterations whose trajectories are written."""

    def iteration(self, record: Record) -> None: ...

    def evaluation(self, record: Record) -> None: ...

    def trajectories(self, iteration: int, groups: list[RecordedGroup]) -> None: ...

    def note(self, text: str) -> None: ...


async def train(run: Run, reporter: Reporter, should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Train from the run's current iteration to its last one.

    Args:
        should_stop: called before each iteration.

    Returns:
        True if the last iteration is done, False if `should_stop` ended training earlier. In both cases the last
        finished iteration has been saved in a checkpoint.
    """
    config = run.config
    last = config.training.iterations
    saved = run.iteration if checkpoint.latest(run.folder) else None
    await run.engine.publish()
    if run.iteration == 0 and saved is None:  # with a checkpoint at 0, it was measured before the stop
        reporter.evaluation(await measure(run, reporter))
    while run.iteration < last and not should_stop():
        rollouts = await rollout_phase(run, run.iteration, reporter)
        record = await learn_phase(run, rollouts, reporter)
        if is_measured(run) and _due(config.reading.every, run.iteration) and (read := await measure_reading(run)):
            record |= {**run.totals, **read.figures()}
        reporter.iteration(record)
        if run.iteration == last or _due(config.evaluation.every, run.iteration):
            reporter.evaluation(await measure(run, reporter))
        if run.iteration == last or _due(config.checkpoint.every, run.iteration):
            await checkpoint.save(run)
            saved = run.iteration
    if saved != run.iteration:
        await checkpoint.save(run)
    return run.iteration >= last


async def rollout_phase(run: Run, number: int, reporter: Reporter) -> Rollouts:
    """Steps 1 to 3: sample G trajectories of each task, unless that was done while the last iteration was trained.

    Args:
        number: of the iteration, from 0.

    Raises:
        UserError: if the first iteration yields nothing to train on.
    """
    config = run.config

    # 1. Synchronise the teacher with the student.
    figures: dict[str, float] = {}
    if run.method.teacher == "synchronised" and number % config.teacher.sync_every == 0:
        wanted, figures = await may_sync(run)
        if wanted:
            await run.learner.sync_teacher(1 - (config.teacher.ema or 0))

    if run.summaries:
        run.summaries.collect()  # summaries that have finished since the last iteration
    if run.ahead is not None:
        rollouts, run.ahead = run.ahead, None
    else:
        rollouts = await _sample(run, reporter, number)
    return replace(rollouts, figures=figures)


async def _sample(run: Run, reporter: Reporter, number: int, *, ahead: bool = False) -> Rollouts:
    """Steps 2 and 3.

    Args:
        ahead: whether the iteration before is trained meanwhile.
    """
    config, clock = run.config, Stopwatch()

    # 2. Pick the tasks.
    tasks, run.visits = run.curriculum.pick(number, run.visits)
    # If the sampling policy sees the context, select it before the rollouts.
    contexts = select_contexts(run, tasks) if run.method.sampler_sees_context else add_readers(run, tasks, number)

    # 3. The student samples under the plain prompt. (Some of the paper's ablations differ: see `Method`.)
    with clock("rollout"):
        collected = await collect(
            run.policy,
            run.task_set,
            tasks,
            run.budget,
            group_size=config.rollout.group_size,
            seed=derive_seed(config.seed, "rollout", number),
            retries=config.rollout.retries,
            concurrency=config.rollout.concurrency,
            contexts=[contexts_for(run, contexts.get(task.id, TeacherContext())).sampler for task in tasks],
        )
    if collected.dropped:
        reporter.note(
            f"{len(collected.dropped)} of {len(tasks)} groups dropped because of infrastructure failures; the last: "
            f"{collected.reason}"
        )
    _check_groups(run, collected, number)
    return Rollouts(number, collected, contexts, clock.total, ahead)


async def learn_phase(run: Run, rollouts: Rollouts, reporter: Reporter) -> Record:
    """Steps 4 to 8: train on the rollouts, then turn the trajectories into skills. Returns the iteration's metrics."""
    config, groups, clock = run.config, rollouts.groups, Stopwatch()
    lag = _policy_lag(run, groups)  # before the update
    hindsight = run.summaries is not None and config.skills.hindsight
    added = 0
    if hindsight:
        with clock("summarise"):
            added = await _summarise(run, rollouts.plain)

    # 4. Pick each task's skill S(x) by UCB.
    rest = [group.task for group in groups if group.task.id not in rollouts.contexts]
    available = {**select_contexts(run, rest), **rollouts.contexts}
    used, contexts = commit_contexts(run, groups, available)
    if run.best:
        run.best.update(rollouts.plain)
    objective = run.objective()

    with clock("uplift"):
        credits = await values_of(run, groups, used)

    async with meanwhile(run, partial(_sample, run, reporter, ahead=True), clock):
        # 5. Group advantages, and the teacher re-scores the student's own tokens under x + S(x).
        with clock("teacher"):
            batch = await build_batch(
                groups,
                contexts,
                run.learner,
                run.renderer,
                temperature=config.rollout.temperature,
                scale_by_std=config.objective.scale_by_std,
                want=objective.want,
                best=run.best,
                replayed=replayed(run),
                rescore=run.method.sampler if objective.importance_cap else None,
            )

        # 6. L = L_GRPO + lambda * L_SDL, and the optimiser's steps.
        with clock("update"):
            updated = await update(run, batch, objective, reporter.note, per_token=run.recorded, on_policy=not lag)
    with clock("update"):
        await run.engine.publish()

    # 7. Credit each used skill with its group's rewards, unless it was too long or nothing was updated.
    in_prompt = [
        context.text is not None and (taught or run.method.student_prompt == "skill")
        for context, taught in zip(used, batch.taught, strict=True)
    ]
    if updated.figures["step/applied"] and config.skills.content == "own":
        credit_skills(run, groups, used, in_prompt, credits)

    # 8. Summarise the finished trajectories into skills for later iterations.
    if not hindsight:
        with clock("summarise"):
            added = await _summarise(run, rollouts.plain)

    if run.recorded:
        with clock("records"):
            reporter.trajectories(run.iteration + 1, record_groups(run, groups, used, contexts, batch, updated))

    waited = 0.0 if rollouts.ahead else rollouts.seconds
    seconds = {"rollout": waited + clock.seconds.pop("rollout", 0.0), **clock.seconds}
    run.iteration += 1
    run.totals["episodes"] += sum(len(group.trajectories) for group in groups)
    run.totals["sampled_tokens"] += sum(t.action_tokens for group in groups for t in group.trajectories)
    run.totals["seconds"] += sum(seconds.values())
    return {
        "iteration": run.iteration,
        **run.totals,
        **describe_rollouts(rollouts),
        **rollouts.figures,
        "rollout/policy_lag": lag,
        **describe_batch(batch, used, in_prompt if run.method.has_context else None),
        **updated.figures,
        **describe_skills(run, added),
        **describe_system(run.learner),
        **run.engine.sampler.metrics(),
        **{f"time/{phase}": spent for phase, spent in seconds.items()},
        "time/iteration": sum(seconds.values()),
    }


async def measure(run: Run, reporter: Reporter) -> Record:
    """A point of the learning curve: the student under the plain prompt on held-out tasks.

    Raises:
        UserError: if no episode can be played, and none could be before.
    """
    options = run.config.evaluation
    record: Record = {"iteration": run.iteration, **run.totals}
    kinds = [("eval", run.config.rollout.temperature, options.samples)]
    if options.greedy:
        kinds.append(("eval_greedy", 0.0, 1))
    for name, temperature, samples in kinds:
        figures = await evaluate(
            run.student_at(temperature),
            run.task_set,
            options.split,
            run.budget,
            seed=derive_seed(run.config.seed, "evaluation"),
            samples=samples,
            limit=options.limit,
            retries=run.config.rollout.retries,
            concurrency=run.config.rollout.concurrency,
        )
        if not figures.tasks:
            lost = f"every episode of the evaluation on {options.split!r} failed: {figures.failure}"
            if not run.totals["episodes"]:
                raise UserError(f"{lost}. Retries failed as well")
            reporter.note(lost)
        record |= {f"{name}/{key}": value for key, value in figures.as_dict().items()}
    return record


def _check_groups(run: Run, collected: Collected, number: int) -> None:
    """Stop a run that gets nothing to train on, with the reason.

    If earlier iterations had episodes, an iteration without any is taken for an outage: it changes no weights, and
    training goes on.
    """
    groups = collected.groups
    if not groups and number == 0:
        raise UserError(
            f"every episode of iteration {number + 1} failed in the environment "
            f"{run.config.environment.name!r}, retries included; the last error: {collected.reason}"
        )
    if groups and not any(trajectory.turns for group in groups for trajectory in group.trajectories):
        raise UserError(
            f"rollout.trajectory_tokens is {run.config.rollout.trajectory_tokens}, but the prompts alone have "
            f"{groups[0].trajectories[0].prompt_length} tokens, which leaves no room for an action: raise it"
        )


def _policy_lag(run: Run, groups: Sequence[Group]) -> float:
    """Number of updates between the oldest weights that sampled a trajectory and the current ones, mean over
    trajectories. 0 in synchronous training."""
    versions = [t.versions for group in groups for t in group.trajectories if t.versions is not None]
    return sum(run.learner.version - oldest for oldest, _ in versions) / len(versions) if versions else 0.0


async def _summarise(run: Run, groups: list[Group]) -> int:
    """Submit the trajectories to the summariser and add finished skills to the bank. Returns how many are new."""
    if run.summaries is None:
        return 0
    number = run.iteration + 1  # counted from 1, as in metrics.jsonl and the trajectory files
    wanted = {"all": (True, False), "successes": (True,), "failures": (False,)}[run.config.skills.sources]
    for group in groups:
        members = [pair for pair in enumerate(group.trajectories) if pair[1].success in wanted]
        if run.config.skills.per_group:
            members = sorted(members, key=lambda pair: -pair[1].reward)[: run.config.skills.per_group]
        for member, trajectory in members:
            source = f"iteration-{number}/{group.task.id}/{member}"
            run.summaries.submit(trajectory, source=source, iteration=number)
    if run.config.skills.deterministic:
        await run.summaries.drain()
    else:
        await asyncio.sleep(0)  # lets the summaries start
    return run.summaries.collect()


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
