"""A deadline measures a call's own time, not the time for which other work blocks the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from toy_env import Toy
from transformers import AutoTokenizer

from skillsd.engines.base import Engine, Sample, Sampler, SampleRequest, WeightsHandle
from skillsd.engines.options import Capabilities
from skillsd.prompting.renderer import ChatRenderer
from skillsd.rollouts.collect import Collected, collect
from skillsd.rollouts.deadline import DeadlineMissedError, finished, within
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.types import Outcome

Call = Callable[[], Coroutine[Any, Any, Any]]


class BlockingSampler(Sampler):
    """Decodes in passes that block the event loop, one token per pass for all requests, like the embedded engine."""

    def __init__(self, tokenizer: Any, seconds: float) -> None:
        self.tokenizer, self.seconds = tokenizer, seconds
        self.stop_tokens: frozenset[int] = frozenset(tokenizer.encode(" Up", add_special_tokens=False))
        self.max_length, self.version = 256, 0
        self._waiting: list[asyncio.Future[None]] = []
        self._passes: asyncio.Task[None] | None = None

    async def sample(self, request: SampleRequest) -> Sample:
        self._waiting.append(asyncio.get_running_loop().create_future())
        mine = self._waiting[-1]
        if self._passes is None or self._passes.done():
            self._passes = asyncio.ensure_future(self._decode())
        await mine
        ids = tuple(self.tokenizer.encode(" Right", add_special_tokens=False))
        return Sample(ids, (-1.0,) * len(ids), "length", 0)

    async def _decode(self) -> None:
        await asyncio.sleep(0)
        while self._waiting:
            time.sleep(self.seconds)  # the pass
            self._waiting.pop(0).set_result(None)
            await asyncio.sleep(0)

    def end_session(self, session: str) -> None:
        pass

    async def load(self, weights: WeightsHandle) -> None:
        pass


def gather(tiny_model: Path, step: Call, *, deadline: float, decoding: float) -> Collected:
    sampler = BlockingSampler(AutoTokenizer.from_pretrained(tiny_model), decoding)
    engine: Any = Engine(sampler, sampler, "blocking", Capabilities())  # type: ignore[arg-type]
    toy = Toy(turns=2)
    toy.faults = lambda call, environment: step() if call == "step" else None
    tasks = toy.tasks("train")[:4]
    policy = EnginePolicy(engine, ChatRenderer(sampler.tokenizer, sampler.stop_tokens))
    budget = Budget(turns=2, turn_tokens=2, trajectory_tokens=60, step_seconds=deadline)
    return asyncio.run(collect(policy, toy, tasks, budget, group_size=2, seed=0, retries=0))


async def _sleeps() -> None:
    await asyncio.sleep(0.03)


async def _exchanges_messages() -> None:
    for _ in range(6):  # each can be delayed by a whole pass
        await asyncio.sleep(0.002)


async def _works_in_a_thread() -> None:
    await asyncio.to_thread(time.sleep, 0.02)


async def _asks_another_process() -> None:
    process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    answer, _ = await process.communicate(b"hello")
    assert answer == b"hello"


@pytest.mark.parametrize("step", [_sleeps, _exchanges_messages, _works_in_a_thread, _asks_another_process])
def test_decoding_passes_longer_than_the_deadline_lose_no_group(tiny_model: Path, step: Call) -> None:
    collected = gather(tiny_model, step, deadline=0.15, decoding=0.2)
    assert collected.infra_failures == {}
    assert len(collected.groups) == 4


def test_an_environment_that_hangs_is_a_timeout_while_the_engine_decodes(tiny_model: Path) -> None:
    begin = time.monotonic()
    collected = gather(tiny_model, lambda: asyncio.sleep(60), deadline=0.2, decoding=0.02)
    assert collected.infra_failures == {Outcome.TIMEOUT: 8}
    assert time.monotonic() - begin < 5


def within_seconds(seconds: float, call: Call) -> Any:
    return asyncio.run(within(seconds, call()))


def test_a_free_loop_is_measured_accurately() -> None:
    async def sleeps(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    assert within_seconds(0.5, lambda: sleeps(0.3)) == "done"
    begin = time.monotonic()
    with pytest.raises(DeadlineMissedError):
        within_seconds(0.1, lambda: sleeps(60))
    assert 0.1 <= time.monotonic() - begin < 0.3


def test_a_call_that_swallows_its_cancellation_is_abandoned() -> None:
    async def stubborn() -> None:
        for _ in range(2):
            with suppress(BaseException):
                await asyncio.sleep(60)

    begin = time.monotonic()
    with pytest.raises(DeadlineMissedError):
        within_seconds(0.05, stubborn)
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("ending", ["return", "raise", "clean up"])
def test_how_a_cancelled_call_ends_does_not_matter(ending: str) -> None:
    cleaned = []

    async def call() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            cleaned.append(True)
            if ending == "raise":
                raise RuntimeError("closed") from None
            if ending == "clean up":
                raise
        return "half a result"

    with pytest.raises(DeadlineMissedError):
        within_seconds(0.05, call)
    assert cleaned == [True]


def test_cancelling_the_task_itself_is_a_cancellation() -> None:
    async def main() -> None:
        task = asyncio.ensure_future(within(60, asyncio.sleep(60)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_waiting_for_other_work_is_measured_in_the_same_way() -> None:
    async def main() -> bool:
        work = asyncio.ensure_future(asyncio.sleep(0.02))
        asyncio.get_running_loop().call_soon(time.sleep, 0.3)
        return await finished(work, 0.1)

    assert asyncio.run(main())
