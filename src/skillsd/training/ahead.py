"""One step off (``training.ahead: 1``): the rollouts of an iteration are sampled while the one before is trained.

They start before the update, with the weights that it starts from, so they are exactly one iteration old when they are
trained on (the first ones are not), and nothing is dropped. Which of the two ends first changes no result. Evaluations,
and episodes that measure a skill's uplift, are played while no rollouts are under way. Not in the paper.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skillsd.training.rollouts import Rollouts
    from skillsd.training.run import Run


@asynccontextmanager
async def meanwhile(
    run: Run,
    play: Callable[[int], Coroutine[Any, Any, Rollouts]],
    clock: Callable[[str], AbstractContextManager[None]],
) -> AsyncIterator[None]:
    """Sample the next iteration's rollouts while the block trains, into `Run.ahead`; afterwards weights may be loaded.

    An engine that can't sample while it trains samples them before the block. Without ``training.ahead``, and in the
    last iteration, the sampler sleeps instead.

    Args:
        play: samples the rollouts of an iteration, given its number.
        clock: counts the seconds that training waits for them as ``rollout``.
    """
    following = run.iteration + 1
    if not run.config.training.ahead or following >= run.config.training.iterations:
        await run.engine.sampler.sleep()  # until the new weights are published
        yield
        return
    rollouts = asyncio.create_task(play(following))
    try:
        with clock("rollout"):
            await _until_learner_is_free(run, rollouts)
        yield
        with clock("rollout"):
            run.ahead = await rollouts
    finally:
        rollouts.cancel()  # if the block failed
        await asyncio.gather(rollouts, return_exceptions=True)


async def _until_learner_is_free(run: Run, rollouts: asyncio.Task[Rollouts]) -> None:
    if not run.engine.capabilities.concurrent:
        await rollouts
        return
    verified = asyncio.ensure_future(run.engine.sampler.verified())
    either: set[asyncio.Future[Any]] = {rollouts, verified}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    verified.cancel()
