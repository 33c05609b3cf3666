"""Summaries written in the background while training goes on (docs/method.md, step 8).

The training loop calls `submit` for each trajectory and `collect` between iterations. A summariser that raises, hangs
or returns something invalid is counted in `stats`; it neither stops nor delays training.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skillsd import user_code
from skillsd.rollouts.deadline import finished
from skillsd.rollouts.records import trajectory_from_json, trajectory_to_json
from skillsd.skills.bank import Bank
from skillsd.skills.summarise import Summariser, SummaryError, check_skill
from skillsd.types import Skill, Task, Trajectory

log = logging.getLogger(__name__)


@dataclass
class _Job:
    trajectory: Trajectory
    source: str
    iteration: int
    skill: Skill | None = None  # set when accepted
    task: asyncio.Task[None] | None = None


class BackgroundSummaries:
    """Summarises trajectories concurrently and adds the skills to `bank`. To be used from one event loop.

    Args:
        max_chars: maximum length of a skill's field, see `check_skill`.
        concurrency: maximum number of summaries in progress; the others wait in a queue.
        timeout: seconds for one summary, without its time in the queue.
        secrets: task -> strings that its skills must not contain, see `check_skill`.
        counts: the counter behind `stats`. Pass one to share it with a summariser that counts its calls and tokens:
            those are then part of the stats and survive a restart.
    """

    def __init__(
        self,
        summariser: Summariser,
        bank: Bank,
        *,
        max_chars: int,
        concurrency: int,
        timeout: float,
        secrets: Callable[[Task], Sequence[str]] = lambda task: (),
        counts: Counter[str] | None = None,
    ) -> None:
        if max_chars < 1 or concurrency < 1 or not timeout > 0:
            raise ValueError(
                "expected max_chars >= 1, concurrency >= 1 and timeout > 0, "
                f"got {max_chars}, {concurrency} and {timeout}"
            )
        self._summariser = summariser
        self._bank = bank
        self._max_chars = max_chars
        self._timeout = timeout
        self._secrets = secrets
        self._slots = asyncio.Semaphore(concurrency)
        self._jobs: dict[int, _Job] = {}  # by submission number: running, or accepted and not yet collected
        self._submitted = 0
        self._stats: Counter[str] = Counter() if counts is None else counts
        self._logged: set[str] = set()  # reasons of failure

    def submit(self, trajectory: Trajectory, *, source: str, iteration: int) -> None:
        """Start summarising `trajectory` and return at once. A trajectory without a reward is counted and skipped.

        Raises:
            HeldOutTaskError: for a task that is not a training task; the summariser is not called.
        """
        self._bank.guard(trajectory.task)
        self._stats["submitted"] += 1
        if not trajectory.outcome.has_reward:
            self._stats["skipped_no_reward"] += 1
            return
        self._start(_Job(trajectory, source, iteration))

    def collect(self) -> int:
        """Add the finished skills to the bank, in the order of submission; returns how many were new.

        To be called between iterations. It is one transaction: if the bank cannot be written, nothing is lost and the
        next call tries again.
        """
        finished = [number for number, job in self._jobs.items() if job.skill is not None]
        if not finished:
            return 0
        before = self._bank.created
        with self._bank.batch():
            for number in sorted(finished):
                job = self._jobs[number]
                assert job.skill is not None
                self._bank.add(
                    job.trajectory.task,
                    job.skill,
                    source=job.source,
                    iteration=job.iteration,
                    reward=job.trajectory.reward,
                    outcome=job.trajectory.outcome,
                )
        for number in finished:
            del self._jobs[number]
        added = self._bank.created - before
        self._stats["added"] += added
        self._stats["duplicate"] += len(finished) - added
        return added

    async def drain(self, timeout: float | None = None) -> bool:
        """Wait for all summaries in progress, at most `timeout` seconds; True if all have finished.

        Called before every `collect`, it makes the bank's content independent of how long summaries take.
        """
        running = [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]
        if not running:
            return True
        _, late = await asyncio.wait(running, timeout=timeout)
        return not late

    def pending(self) -> list[dict[str, Any]]:
        """What was submitted and is not in the bank yet, as JSON-serialisable records for the checkpoint."""
        return [
            {
                "trajectory": trajectory_to_json(job.trajectory),
                "source": job.source,
                "iteration": job.iteration,
                "skill": None if job.skill is None else dataclasses.asdict(job.skill),
            }
            for _, job in sorted(self._jobs.items())
        ]

    def resume(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Continue with the records of `pending`: finished skills wait for `collect`, the other summaries start again.

        Raises:
            HeldOutTaskError: for a record of a task that is not a training task.
            ValueError: if a record was not written by `pending`.
        """
        jobs = [_job(record) for record in records]
        for job in jobs:
            self._bank.guard(job.trajectory.task)
        for job in jobs:
            self._stats["resumed"] += 1
            self._start(job)

    def stats(self) -> dict[str, int]:
        """Counts since the start of the run, for the metrics; zeros are left out.

        ``submitted``, ``resumed``, ``pending`` (now), ``added``, ``duplicate``, ``no_skill`` (the summariser returned
        None), ``failed`` (it raised), ``timeout``, ``rejected_<reason>`` (see `check_skill`), ``skipped_no_reward``,
        each `SummaryError.reason`, and the summariser's own counts.
        """
        return {**self._stats, "pending": len(self._jobs)}

    def restore_stats(self, stats: Mapping[str, int]) -> None:
        """Continue counting from a checkpoint's `stats`."""
        self._stats.clear()
        self._stats.update({name: count for name, count in stats.items() if name != "pending"})

    def _start(self, job: _Job) -> None:
        number = self._submitted
        self._submitted += 1
        self._jobs[number] = job
        if job.skill is None:
            job.task = asyncio.create_task(self._run(number, job), name=f"summary of {job.source}")

    async def _run(self, number: int, job: _Job) -> None:
        async with self._slots:
            result = await self._summarise(job)
        if isinstance(result, Skill):
            job.skill = result  # the job stays in the dict until `collect`
        else:
            self._stats[result] += 1
            del self._jobs[number]

    async def _summarise(self, job: _Job) -> Skill | str:
        """The accepted skill, or the name of the count for the reason that there is none."""
        writing = asyncio.ensure_future(self._call(job.trajectory))
        try:
            # Not `asyncio.timeout`, which would wait for ever on a summariser that swallows its cancellation.
            if not await finished(writing, self._timeout):
                took = f"the summary of {job.source} took more than {self._timeout:g} s (skills.timeout_seconds)"
                user_code.mention("the summariser: timeout", f"{took}: abandoned")
                return "timeout"
            if writing.cancelled():
                user_code.mention("the summariser: cancelled", f"the summary of {job.source} cancelled itself")
                return "failed"
            skill = writing.result()
            if isinstance(skill, SystemExit):
                raise skill
            if skill is None:
                return "no_skill"
            secrets = self._secrets(job.trajectory.task)
            reason = check_skill(skill, job.trajectory, max_chars=self._max_chars, secrets=secrets)
            if reason == "malformed":
                user_code.mention("the summariser: malformed", f"the summariser returned {_shown(skill)}")
            if reason is None:
                assert isinstance(skill, Skill)
                return skill
            return f"rejected_{reason}"
        except SummaryError as error:
            if error.reason not in self._logged:
                self._logged.add(error.reason)
                log.warning(
                    "no skill from %s: %s (further ones are only counted, as %s)", job.source, error, error.reason
                )
            return error.reason
        except (Exception, SystemExit) as error:
            user_code.record("the summariser", error)
            return "failed"
        finally:
            writing.cancel()
            writing.add_done_callback(_look_at)

    async def _call(self, trajectory: Trajectory) -> object:
        # Wrapped in a coroutine so that any fault of the summariser (e.g. it returns no awaitable) ends up in the task.
        try:
            return await self._summariser.summarise(trajectory)
        except SystemExit as error:  # leaving the task, it would end the whole process
            return error


def _shown(skill: object) -> str:
    """What a summariser returned instead of a skill, in words."""
    if not isinstance(skill, Skill):
        return f"{skill!a:.80} ({type(skill).__name__}), expected a Skill or None"
    wrong = [f.name for f in dataclasses.fields(Skill) if not isinstance(getattr(skill, f.name), str)]
    if not wrong:
        return "a Skill with text that is not valid Unicode (half a surrogate pair)"
    return f"a Skill whose {wrong[0]} is {type(getattr(skill, wrong[0])).__name__}, expected text"


def _job(record: Mapping[str, Any]) -> _Job:
    """The job of a record that `pending` gave."""
    try:
        trajectory, source, iteration = (
            trajectory_from_json(record["trajectory"]),
            record["source"],
            record["iteration"],
        )
        skill = None if record["skill"] is None else Skill(**record["skill"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a record of a pending summary: {error!r}") from error
    texts = (source, *(dataclasses.astuple(skill) if skill else ()))
    if not isinstance(iteration, int) or not all(isinstance(text, str) for text in texts):
        raise ValueError("not a record of a pending summary: something in it has another type")
    return _Job(trajectory, source, iteration, skill)


def _look_at(task: asyncio.Future[Any]) -> None:
    """Retrieve an abandoned task's exception; asyncio would log it otherwise."""
    if not task.cancelled():
        task.exception()
