"""Host processes: start, deadlines, faults, replacement and recycling, with a small host and injected faults."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skillsd.envs.hosts import Host, HostBrokenError, HostHungError, Pool, Session
from skillsd.rollouts.collect import collect
from skillsd.rollouts.policy import Budget, EpisodeState
from skillsd.types import Message, Outcome

sys.path.insert(0, str(Path(__file__).parent))
from fake_games import FakeGames

SECONDS = 20.0
"""Far above what is needed on an idle machine."""


@pytest.fixture
def host() -> Iterator[Host]:
    made = FakeGames.engine.host()
    yield made
    made.stop()


async def opened(host: Host) -> Session:
    session = await Session.connect(host)
    await session.ask("open", SECONDS, {"task": str}, rooms=3, key=1)
    return session


def gone(pid: int) -> bool:
    """Whether a process has ended; waits for it."""
    deadline = time.monotonic() + SECONDS
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_sessions_have_games_of_their_own(host: Host) -> None:
    async def use() -> None:
        one, other = await opened(host), await opened(host)
        moved = await one.ask("step", SECONDS, {"text": str}, command="go 2")
        stayed = await other.ask("step", SECONDS, {"text": str}, command="take key")
        assert (moved["text"], stayed["text"]) == ("You are in room 2.", "There is no key.")
        assert len(host.sessions) == 2
        await one.close()
        await one.close()
        await other.close()
        assert len(host.sessions) == 0

    asyncio.run(use())


@pytest.mark.parametrize(
    ("command", "message", "survives"),
    [
        ("crash", "died during 'step'", False),
        ("garbage", "malformed response to 'step': b'garbage", False),
        ("incomplete", "without a valid 'score'", False),
        ("fault", "failed at 'step': ValueError: the engine has a fault", True),
    ],
)
def test_a_fault_breaks_the_session(host: Host, command: str, message: str, survives: bool) -> None:
    """A host that may be damaged is killed; one that reports an error of one game is not."""

    async def use() -> None:
        other, session = await opened(host), await opened(host)
        first = host.pid
        assert first is not None
        with pytest.raises(HostBrokenError, match=message):
            await session.ask("step", SECONDS, {"score": float}, command=command)
        if survives:
            await other.ask("step", SECONDS, {"text": str}, command="go 1")
        else:
            assert gone(first)
            with pytest.raises(HostBrokenError):
                await other.ask("step", SECONDS, {"text": str}, command="go 1")
        await opened(host)  # a new host, if necessary
        assert (host.pid == first) is survives

    asyncio.run(use())


def test_a_hung_host_is_killed_at_the_deadline(host: Host) -> None:
    async def use() -> int | None:
        session = await opened(host)
        with pytest.raises(HostHungError, match=r"took longer than 0.2 s for 'step': killed"):
            await session.ask("step", 0.2, {}, command="hang")
        return session._host_pid

    pid = asyncio.run(use())
    assert pid is not None
    assert gone(pid)
    host.ensure()
    assert host.pid is not None
    os.kill(host.pid, signal.SIGSTOP)
    with pytest.raises(HostHungError, match=r"took longer than 0.2 s for 'pid': killed"):
        host.ask("pid", 0.2, {})  # without an event loop


def test_a_late_fault_spares_the_next_host(host: Host) -> None:
    """The session of a host that was replaced in the meantime must not kill the new one."""

    async def use() -> None:
        old = await opened(host)
        host.kill(host.pid)
        assert old._host_pid is not None
        assert gone(old._host_pid)
        new = await opened(host)
        with pytest.raises(HostBrokenError):
            await old.ask("step", SECONDS, {}, command="go 1")
        await new.ask("step", SECONDS, {}, command="go 1")

    asyncio.run(use())


def test_a_cancelled_request_leaves_the_host_to_the_others(host: Host) -> None:
    async def use() -> None:
        session, other = await opened(host), await opened(host)
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0):
                await session.ask("step", SECONDS, {}, command="go 1")
        assert list(host.sessions) == [other]
        await other.ask("step", SECONDS, {}, command="go 1")

    asyncio.run(use())


def test_requests_without_an_event_loop(host: Host) -> None:
    assert host.ask("pid", SECONDS, {"pid": int}) == {"pid": host.pid}
    with pytest.raises(HostBrokenError, match="failed at 'no_such_op'"):
        host.ask("no_such_op", SECONDS, {})
    with pytest.raises(HostBrokenError, match="without a valid 'pid'"):
        host.ask("pid", SECONDS, {"pid": str})


def test_a_host_that_does_not_start_reports_the_end_of_its_log(tmp_path: Path) -> None:
    script = "import sys; sys.exit('no engine here')"
    with pytest.raises(HostBrokenError, match="a host did not start: no engine here"):
        Host("a host", lambda socket: [sys.executable, "-c", script]).ensure()
    with pytest.raises(HostBrokenError, match="did not start: its log is empty"):
        Host("a host", lambda socket: ["/bin/cat"], start_seconds=0.2).ensure()


def test_a_pool_spreads_and_recycles() -> None:
    async def use() -> None:
        pool = Pool(FakeGames.engine.host, size=2, recycle=3)
        try:
            first = await asyncio.gather(*(pool.connect(Session) for _ in range(4)))
            assert [len(host.sessions) for host in pool.hosts] == [2, 2]
            old = pool.hosts[0]
            more = [await pool.connect(Session) for _ in range(2)]  # the third one of each host: both retire
            kept = await pool.connect(Session)
            assert old not in pool.hosts
            assert old in pool.retired
            pid = old.pid
            assert pid is not None
            await old_session(first, old).ask("pid", SECONDS, {"pid": int})  # a retired host serves to the end
            for session in (*first, *more):
                await session.close()
            await pool.connect(Session)
            assert pool.retired == []
            assert gone(pid)
            await kept.ask("pid", SECONDS, {"pid": int})
        finally:
            pool.stop()

    def old_session(sessions: list[Session], host: Host) -> Session:
        return next(session for session in sessions if session._host is host)

    asyncio.run(use())


def test_forgotten_sessions_don_t_count(host: Host) -> None:
    async def use() -> None:
        await opened(host)

    asyncio.run(use())
    assert len(host.sessions) == 0


def test_hosts_end_with_the_trainer(tmp_path: Path) -> None:
    """Also while a game hangs, and if the trainer is killed."""
    program = f"""
        import asyncio, os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from fake_games import FakeGames
        from skillsd.envs.hosts import Session
        async def main():
            host = FakeGames.engine.host()
            session = await Session.connect(host)
            await session.ask("open", 20, {{}}, rooms=3, key=1)
            asyncio.get_running_loop().call_later(0.3, os.kill, os.getpid(), signal.SIGKILL)
            print(host.pid, host.address.parent, flush=True)
            await session.ask("step", 20, {{}}, command="hang")
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, folder = done.stdout.split()
    assert gone(int(pid))
    assert not Path(folder).exists()


class Script:
    """A `Policy` that plays the task's solution, with a fault before it in the first episodes."""

    temperature = 1.0

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults

    def begin(
        self, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str = ""
    ) -> EpisodeState:
        actions = ["go 1", "take key"]
        if self.faults:
            actions.insert(1, self.faults.pop())

        class Scripted(EpisodeState):
            async def act(self, turn: int) -> str | None:
                return actions[turn] if turn < len(actions) else None

            def observe(self, observation: str) -> None:
                pass

        return Scripted()


def test_episodes_of_broken_hosts_are_retried() -> None:
    games = FakeGames(call_seconds=1)
    task = games.tasks("train")[1]
    budget = Budget(turns=6, turn_tokens=10, trajectory_tokens=1000)
    try:
        collected = asyncio.run(
            collect(
                Script(["crash", "garbage", "hang", "fault"]), games, [task], budget, group_size=3, seed=0, retries=9
            )
        )
    finally:
        games.pool().stop()
    [group] = collected.groups
    assert [trajectory.outcome for trajectory in group.trajectories] == [Outcome.SOLVED] * 3
    assert collected.infra_failures[Outcome.ENV_ERROR] >= 4
