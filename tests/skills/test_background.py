"""Background summaries: order, limits, faults of the summariser, and restarts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from skillsd import user_code
from skillsd.rollouts.records import trajectory_to_json
from skillsd.skills.background import BackgroundSummaries
from skillsd.skills.bank import Bank, HeldOutTaskError
from skillsd.skills.summarise import RuleSummariser, Summariser
from skillsd.types import Outcome, Skill, Task, Trajectory

Make = Callable[..., Trajectory]


class Async:
    """A summariser made from an async function."""

    def __init__(self, fn: Callable[[Trajectory], Awaitable[Any]]) -> None:
        self.summarise: Any = fn


def by_seed(trajectory: Trajectory) -> Skill:
    return Skill("", "", f"skill {trajectory.seed}")


def background(bank: Bank, summariser: Summariser, **options: Any) -> BackgroundSummaries:
    return BackgroundSummaries(summariser, bank, **{"max_chars": 1000, "concurrency": 4, "timeout": 5.0, **options})


@pytest.fixture
def bank() -> Iterator[Bank]:
    with Bank(":memory:") as bank:
        yield bank


def skills(bank: Bank) -> list[str]:
    return [stored.skill.golden_workflow for stored in bank.skills()]


def test_from_trajectory_to_bank(bank: Bank, trajectory_with: Make) -> None:
    async def main() -> None:
        work = background(bank, RuleSummariser(by_seed))
        failed = trajectory_with(seed=1, outcome=Outcome.FAILED, reward=0.25, success=False)
        work.submit(failed, source="iteration-4/level-1/0", iteration=4)
        assert work.stats() == {"submitted": 1, "pending": 1}
        assert await work.drain()
        assert work.collect() == 1
        assert work.collect() == 0
        assert work.stats() == {"submitted": 1, "added": 1, "duplicate": 0, "pending": 0}

    asyncio.run(main())
    (stored,) = bank.skills()
    assert (stored.source, stored.iteration) == ("iteration-4/level-1/0", 4)
    assert (stored.source_reward, stored.source_outcome) == (0.25, Outcome.FAILED)
    assert stored.skill == Skill("", "", "skill 1")


def test_bank_is_written_in_order_of_submission(bank: Bank, trajectory_with: Make) -> None:
    async def slowest_first(trajectory: Trajectory) -> Skill:
        await asyncio.sleep(0.02 * (5 - trajectory.seed))
        return by_seed(trajectory)

    async def main() -> None:
        work = background(bank, Async(slowest_first), concurrency=8)
        for seed in range(5):
            work.submit(trajectory_with(seed=seed), source="s", iteration=0)
        assert await work.drain(timeout=5)
        assert work.collect() == 5

    asyncio.run(main())
    assert skills(bank) == [f"skill {seed}" for seed in range(5)]


def test_submit_and_collect_do_not_wait(bank: Bank, trajectory_with: Make) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def gated(trajectory: Trajectory) -> Skill:
            if trajectory.seed == 0:
                await gate.wait()
            return by_seed(trajectory)

        work = background(bank, Async(gated))
        for seed in range(3):
            work.submit(trajectory_with(seed=seed), source="s", iteration=0)
        assert await work.drain(timeout=0.05) is False
        assert work.collect() == 2  # finished skills are collected, the first one follows later
        gate.set()
        assert await work.drain(timeout=5) is True
        assert work.collect() == 1

    asyncio.run(main())
    assert skills(bank) == ["skill 1", "skill 2", "skill 0"]


def test_concurrency_is_limited(bank: Bank, trajectory_with: Make) -> None:
    now = most = 0

    async def counted(trajectory: Trajectory) -> Skill:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return by_seed(trajectory)

    async def main() -> None:
        work = background(bank, Async(counted), concurrency=2)
        for seed in range(7):
            work.submit(trajectory_with(seed=seed), source="s", iteration=0)
        await work.drain()
        assert work.collect() == 7

    asyncio.run(main())
    assert most == 2


async def raises(trajectory: Trajectory) -> Skill:
    raise RuntimeError("server error")


async def cancels_itself(trajectory: Trajectory) -> Skill:
    raise asyncio.CancelledError


async def hangs(trajectory: Trajectory) -> Skill:
    await asyncio.Event().wait()
    raise AssertionError


async def ignores_cancellation(trajectory: Trajectory) -> Skill:
    """Swallows its cancellation, like a badly written client, and raises much later."""
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        await asyncio.sleep(0.3)
    raise RuntimeError("late")


async def returns_text(trajectory: Trajectory) -> str:
    return "Sure! Here is the skill:"


async def returns_empty(trajectory: Trajectory) -> Skill:
    return Skill(" ", "", "")


async def too_long(trajectory: Trajectory) -> Skill:
    return Skill("", "", "and then " * 1000)


async def copies(trajectory: Trajectory) -> Skill:
    return Skill("", "", "\n".join(f"{turn.action}\n{turn.observation}" for turn in trajectory.turns))


async def returns_none(trajectory: Trajectory) -> None:
    return None


def not_async(trajectory: Trajectory) -> Skill:
    return Skill("", "", "x")


def raises_at_once(trajectory: Trajectory) -> Skill:
    raise KeyError("task")


async def exits(trajectory: Trajectory) -> Skill:
    raise SystemExit("bye")


async def returns_a_dict(trajectory: Trajectory) -> dict[str, str]:
    return {"success_analysis": "", "mistake_analysis": "", "golden_workflow": "up"}


async def returns_numbers(trajectory: Trajectory) -> Skill:
    return Skill("", "", 3)  # type: ignore[arg-type]


async def returns_half_a_surrogate(trajectory: Trajectory) -> Skill:
    return Skill("", "", "\ud83d")


@pytest.mark.parametrize(
    ("fault", "counted_as"),
    [
        (raises, "failed"),
        (cancels_itself, "failed"),
        (hangs, "timeout"),
        (ignores_cancellation, "timeout"),
        (returns_text, "rejected_malformed"),
        (returns_empty, "rejected_empty"),
        (too_long, "rejected_too_long"),
        (copies, "rejected_copies_trajectory"),
        (returns_none, "no_skill"),
        (not_async, "failed"),
        (raises_at_once, "failed"),
        (exits, "failed"),
        (returns_a_dict, "rejected_malformed"),
        (returns_numbers, "rejected_malformed"),
        (returns_half_a_surrogate, "rejected_malformed"),
    ],
)
def test_fault_is_counted_and_stops_nothing_else(
    bank: Bank, trajectory_with: Make, fault: Any, counted_as: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def one_fault(trajectory: Trajectory) -> Any:
        return by_seed(trajectory) if trajectory.seed else await fault(trajectory)

    async def main() -> None:
        # With one slot, a slot that is not released would block the others.
        work = background(bank, Async(one_fault), concurrency=1, timeout=0.1)
        for seed in range(3):
            work.submit(trajectory_with(seed=seed), source="s", iteration=0)
        assert await work.drain(timeout=3)
        assert work.collect() == 2
        stats = work.stats()
        assert stats.pop(counted_as) == 1
        assert stats == {"submitted": 3, "added": 2, "duplicate": 0, "pending": 0}
        assert work.pending() == []
        if fault is ignores_cancellation:
            await asyncio.sleep(0.4)  # its late exception must not be logged

    asyncio.run(main())
    assert skills(bank) == ["skill 1", "skill 2"]
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        (raises, r"the summariser raised RuntimeError: server error \(.*test_background\.py:\d+\)"),
        (exits, r"the summariser raised SystemExit: bye \(.*test_background\.py:\d+\)"),
        (returns_text, r"the summariser returned 'Sure! Here is the skill:' \(str\), expected a Skill or None"),
        (returns_a_dict, r"the summariser returned {.*\(dict\), expected a Skill or None"),
        (returns_numbers, r"the summariser returned a Skill whose golden_workflow is int, expected text"),
        (returns_half_a_surrogate, r"not valid Unicode"),
        (hangs, r"took more than 0\.05 s \(skills\.timeout_seconds\): abandoned"),
    ],
)
def test_a_fault_is_noted_once(bank: Bank, trajectory_with: Make, fault: Any, note: str) -> None:
    notes: list[str] = []

    async def main() -> None:
        work = background(bank, Async(fault), timeout=0.05)
        for seed in range(5):
            work.submit(trajectory_with(seed=seed), source="s", iteration=0)
        assert await work.drain(timeout=3)

    with user_code.logged_in(user_code.FaultLog(None, notes.append)):
        asyncio.run(main())
    [only] = notes
    assert re.search(note, only), only
    assert "only counted" in only


def test_secrets_that_cannot_be_read_reject_the_skill(bank: Bank, trajectory: Trajectory) -> None:
    def secrets(task: Task) -> list[str]:
        raise LookupError(task.id)

    async def main() -> dict[str, int]:
        work = background(bank, RuleSummariser(by_seed), secrets=secrets)
        work.submit(trajectory, source="s", iteration=0)
        await work.drain()
        assert work.collect() == 0
        return work.stats()

    assert asyncio.run(main())["failed"] == 1


def test_a_rule_that_turns_out_to_be_async_is_awaited(bank: Bank, trajectory: Trajectory) -> None:
    async def rule(trajectory: Trajectory) -> Skill:
        return by_seed(trajectory)

    async def main() -> int:
        work = background(bank, RuleSummariser(rule))  # type: ignore[arg-type]
        work.submit(trajectory, source="s", iteration=0)
        await work.drain()
        return work.collect()

    assert asyncio.run(main()) == 1


def test_duplicates_are_counted(bank: Bank, trajectory: Trajectory) -> None:
    async def main() -> None:
        work = background(bank, RuleSummariser(by_seed))
        for _ in range(3):
            work.submit(trajectory, source="s", iteration=0)
        await work.drain()
        assert work.collect() == 1
        assert work.stats()["duplicate"] == 2

    asyncio.run(main())


def test_held_out_task_is_never_summarised(bank: Bank, trajectory_with: Make) -> None:
    seen: list[Trajectory] = []

    async def main() -> None:
        work = background(bank, RuleSummariser(seen.append))
        task = dataclasses.replace(trajectory_with().task, split="test")
        record = {"source": "s", "iteration": 0, "skill": None}
        with pytest.raises(HeldOutTaskError, match="'test'"):
            work.submit(trajectory_with(task=task), source="s", iteration=0)
        work.submit(trajectory_with(outcome=Outcome.TIMEOUT), source="s", iteration=0)
        assert work.stats()["skipped_no_reward"] == 1
        with pytest.raises(HeldOutTaskError):
            work.resume([{**record, "trajectory": trajectory_to_json(trajectory_with(task=task))}])
        assert await work.drain()
        assert work.stats()["pending"] == 0

    asyncio.run(main())
    assert not seen


def test_nothing_is_lost_if_the_bank_cannot_be_written(
    bank: Bank, trajectory_with: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        work = background(bank, RuleSummariser(by_seed))
        for seed in range(3):
            work.submit(trajectory_with(seed=seed), source="s", iteration=0)
        await work.drain()
        add, calls = bank.add, 0

        def disk_full(*args: Any, **kwargs: Any) -> int:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise OSError("disk full")
            return add(*args, **kwargs)

        monkeypatch.setattr(bank, "add", disk_full)
        with pytest.raises(OSError, match="disk full"):
            work.collect()
        assert len(bank) == 0
        assert work.collect() == 3

    asyncio.run(main())
    assert skills(bank) == ["skill 0", "skill 1", "skill 2"]


def test_restart_continues_with_pending_summaries(trajectory_with: Make) -> None:
    calls: list[int] = []

    async def first_run() -> str:
        async def second_hangs(trajectory: Trajectory) -> Skill:
            if trajectory.seed == 1:
                await asyncio.Event().wait()
            return by_seed(trajectory)

        with Bank(":memory:") as bank:
            work = background(bank, Async(second_hangs))
            for seed in range(3):
                work.submit(trajectory_with(seed=seed), source=f"s{seed}", iteration=seed)
            await work.drain(timeout=0.05)
            return json.dumps(work.pending())

    async def second_run(records: str, bank: Bank) -> None:
        async def counted(trajectory: Trajectory) -> Skill:
            calls.append(trajectory.seed)
            return by_seed(trajectory)

        work = background(bank, Async(counted))
        work.resume(json.loads(records))
        assert json.dumps(work.pending()) == records
        await work.drain()
        assert work.collect() == 3

    records = asyncio.run(first_run())
    with Bank(":memory:") as bank:
        asyncio.run(second_run(records, bank))
        assert skills(bank) == ["skill 0", "skill 1", "skill 2"]
        assert [(stored.source, stored.iteration) for stored in bank.skills()] == [
            ("s0", 0),
            ("s1", 1),
            ("s2", 2),
        ]
    assert calls == [1]  # finished summaries are not repeated


@pytest.mark.parametrize("record", [{}, {"trajectory": 3}, {"trajectory": {"format": 1}}])
def test_invalid_record_is_refused(bank: Bank, record: dict[str, Any]) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="not a"):
            background(bank, RuleSummariser(by_seed)).resume([record])

    asyncio.run(main())


@pytest.mark.parametrize("option", [{"concurrency": 0}, {"max_chars": 0}, {"timeout": 0}])
def test_invalid_settings_are_refused(bank: Bank, option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        background(bank, RuleSummariser(by_seed), **option)
