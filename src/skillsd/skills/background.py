"""Summaries that are written while training goes on (METHOD.md, step 2: "asynchronously").

The training loop calls `submit` for each trajectory and `collect` between iterations. A summariser that
raises, hangs or returns rubbish is counted in `stats`; it neither stops nor delays training.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    skill: Skill | None = None  # the accepted skill, once there is one
    task: asyncio.Task[None] | None = None


class BackgroundSummaries:
    """Trajectories on their way to becoming skills of `bank`. To be used from one event loop.

    Args:
        max_chars: the most characters of a skill's field, see `check_skill`.
        concurrency: the most summaries that are written at once; the others wait their turn.
        timeout: seconds that one summary may take, its waiting not counted.
        secrets: what a skill of a task must not say, see `check_skill`.
        counts: where `stats` are counted; a summariser that counts too (calls, tokens ...) shares it, and its counts
            are in the stats and survive a restart.
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
        self._told: set[str] = set()  # reasons that were logged

    def submit(self, trajectory: Trajectory, *, source: str, iteration: int) -> None:
        """Start the summary of `trajectory` and return at once; one without a reward is counted and left.

        Raises:
            HeldOutTaskError: for a task that is not a training task. No summariser gets to see it.
        """
        self._bank.guard(trajectory.task)
        self._stats["submitted"] += 1
        if not trajectory.outcome.has_reward:
            self._stats["skipped_no_reward"] += 1
            return
        self._start(_Job(trajectory, source, iteration))

    def collect(self) -> int:
        """Put the finished skills into the bank, in the order of submission; return how many were new to it.

        To be called between iterations. One transaction: if the bank cannot be written, nothing is lost and
        the next call tries again.
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
        """Wait until no summary is being written, at most `timeout` seconds; True if none is.

        With it before every `collect`, what the bank holds depends on no summary's duration (deterministic).
        """
        running = [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]
        if not running:
            return True
        _, late = await asyncio.wait(running, timeout=timeout)
        return not late

    def pending(self) -> list[dict[str, Any]]:
        """What was submitted and is not in the bank yet, as JSON-able records for the checkpoint."""
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
        """Take up what `pending` recorded: finished skills wait for `collect` again, the others start anew.

        Raises:
            HeldOutTaskError: if a record is of a task that is not a training task.
            ValueError: for a record that `pending` did not write.
        """
        for record in records:
            try:
                trajectory = trajectory_from_json(record["trajectory"])
                skill = None if record["skill"] is None else Skill(**record["skill"])
                job = _Job(trajectory, record["source"], record["iteration"], skill)
            except (KeyError, TypeError) as error:
                raise ValueError(f"not a record of a pending summary: {error!r}") from error
            self._bank.guard(trajectory.task)
            self._stats["resumed"] += 1
            self._start(job)

    def stats(self) -> dict[str, int]:
        """Counts since the start, for the metrics.

        ``submitted``, ``resumed``, ``pending`` (now), ``added``, ``duplicate``, ``no_skill`` (the summariser
        found nothing to say), ``failed`` (it raised), ``timeout``, ``rejected_<reason>`` (see `check_skill`),
        ``skipped_no_reward``, the `SummaryError.reason` of others, and what the summariser counts itself; those
        that never happened are left out.
        """
        return {**self._stats, "pending": len(self._jobs)}

    def restore_stats(self, stats: Mapping[str, int]) -> None:
        """Go on counting where `stats` of a checkpoint stopped."""
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
            job.skill = result  # stays among the jobs until `collect`
        else:
            self._stats[result] += 1
            del self._jobs[number]

    async def _summarise(self, job: _Job) -> Skill | str:
        """The accepted skill, or the name under which its absence is counted."""
        writing = asyncio.ensure_future(self._call(job.trajectory))
        try:
            # Not `asyncio.timeout`: that would wait for ever on a summariser which swallows its cancellation.
            await asyncio.wait([writing], timeout=self._timeout)
            if not writing.done():
                log.warning("the summary of %s took more than %g s: given up", job.source, self._timeout)
                return "timeout"
            if writing.cancelled():
                return "failed"
            skill = writing.result()
            if skill is None:
                return "no_skill"
            secrets = self._secrets(job.trajectory.task)
            reason = check_skill(skill, job.trajectory, max_chars=self._max_chars, secrets=secrets)
            return skill if reason is None else f"rejected_{reason}"
        except SummaryError as error:
            if error.reason not in self._told:
                self._told.add(error.reason)
                log.warning("no skill of %s: %s (from now on only counted, as %s)", job.source, error, error.reason)
            return error.reason
        except Exception as error:
            log.warning("the summary of %s failed: %s: %s", job.source, type(error).__name__, error)
            return "failed"
        finally:
            writing.cancel()
            writing.add_done_callback(_look_at)

    async def _call(self, trajectory: Trajectory) -> Skill | None:
        # A task of its own: whatever is wrong with the summariser (no coroutine ...) shows in its result.
        return await self._summariser.summarise(trajectory)


def _look_at(task: asyncio.Future[Any]) -> None:
    """Retrieve an abandoned task's exception, which asyncio would otherwise complain about."""
    if not task.cancelled():
        task.exception()
