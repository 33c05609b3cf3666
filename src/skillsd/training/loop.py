"""One training iteration on one page, in the order of the paper's Algorithm 1. No backend, environment or method is
named here: `Run` brings them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from skillsd.errors import UserError
from skillsd.rollouts.collect import collect
from skillsd.seeds import derive_seed
from skillsd.training import checkpoint
from skillsd.training import lessons as lessons_of
from skillsd.training.batches import build_batch
from skillsd.training.evaluate import evaluate
from skillsd.training.figures import describe_batch, describe_rollouts, describe_skills, describe_system
from skillsd.training.lessons import Lesson, told
from skillsd.training.optimise import optimise
from skillsd.training.run import Run, actor_at
from skillsd.training.uplift import measure_uplift
from skillsd.types import Group

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
    hindsight = run.summaries is not None and config.skills.hindsight

    if run.method.teacher == "synchronised" and number % config.teacher.sync_every == 0:
        run.engine.sync_teacher(1 - (config.teacher.ema or 0))
    tasks = run.curriculum.pick(number)
    if run.summaries:
        run.summaries.collect()  # what became ready meanwhile
    # Whoever acts and is told a lesson must be told beforehand.
    lessons = lessons_of.choose(run, tasks) if run.method.actor_is_told else {}

    # The student acts, under the plain prompt. (In some of the paper's comparisons it does not: see `Method`.)
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
            contexts=[told(run, lessons[task.id]).actor for task in tasks] if lessons else None,
        )
    groups = collected.groups
    if collected.dropped:
        reporter.note(f"{len(collected.dropped)} of {len(tasks)} groups dropped; the environment: {collected.reason}")
    _check_groups(run, groups, collected.reason)

    # The teacher is told more (a skill of each task's own bank), and re-scores what the student said.
    written = 0
    if hindsight:
        with clock("summarise"):
            written = await _summarise(run, groups)
    used, words = lessons_of.settle(run, groups, lessons or lessons_of.choose(run, [group.task for group in groups]))
    if run.best:
        run.best.update(groups)
    objective = run.objective()
    with clock("teacher"):
        batch = await _compute(
            run,
            lambda: build_batch(
                groups,
                words,
                run.engine,
                run.renderer,
                temperature=config.rollout.temperature,
                scale_by_std=config.objective.scale_by_std,
                distribution=objective.needs_distribution,
                top_k=objective.top_k,
                best=run.best,
                rescore=run.method.sampler if objective.importance_cap else None,
            ),
        )

    # A skill's uplift is that of the policy which it taught, so it is measured before the update.
    with clock("uplift"):
        worth = await _worth(run, groups, used)

    # L = L_GRPO + lambda * L_SDL
    with clock("update"):
        updated = await _compute(run, lambda: optimise(run, batch, objective, reporter.note))

    # A skill is credited for what was trained while it was used: not if it did not fit, nor if nothing was updated.
    with run.bank.batch():
        for lesson, taught, values in zip(used, batch.taught, worth, strict=True):
            heard = taught or (run.method.student_prompt == "skill" and lesson.text)
            if lesson.skill and heard and updated["step/applied"] and config.skills.content == "own":
                run.bank.credit(lesson.skill.id, values)

    # Finished trajectories become skills, for later iterations.
    if not hindsight:
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
        **describe_batch(batch, used),
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
            retries=run.config.rollout.retries,
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


async def _worth(run: Run, groups: list[Group], lessons: list[Lesson]) -> list[Sequence[float]]:
    """What each lesson's skill is to be credited with."""
    if run.config.skills.credit == "source":
        return [[lesson.skill.source_reward] if lesson.skill else [] for lesson in lessons]
    if run.config.skills.credit == "reward":
        return [group.rewards for group in groups]
    asked = [(group, lesson.text) for group, lesson in zip(groups, lessons, strict=True) if lesson.text]
    measured = await measure_uplift(
        run.student,
        run.task_set,
        [(group.task, text) for group, text in asked],
        run.budget,
        episodes=run.config.skills.uplift_episodes,
        seed=derive_seed(run.config.seed, "uplift", run.iteration),
        concurrency=run.config.rollout.concurrency,
        retries=run.config.rollout.retries,
        plain={group.task.id: sum(group.rewards) / len(group.rewards) for group, _ in asked},
    )
    run.totals["episodes"] += sum(uplift.episodes for uplift in measured)
    by_task = {uplift.task_id: uplift.score for uplift in measured}
    return [[by_task[group.task.id]] if group.task.id in by_task else [] for group in groups]


async def _summarise(run: Run, groups: list[Group]) -> int:
    """Hand all trajectories to the summariser; put what is ready into the bank. Returns how many skills are new."""
    if run.summaries is None:
        return 0
    number = run.iteration + 1  # as metrics.jsonl and the trajectories' files count it
    wanted = {"all": (True, False), "successes": (True,), "failures": (False,)}[run.config.skills.sources]
    for group in groups:
        for member, trajectory in enumerate(group.trajectories):
            if trajectory.success not in wanted:
                continue
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
