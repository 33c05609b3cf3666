"""Schedules of requests that bring decoders into all kinds of states."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any, TypeVar

from skillsd.engines.base import SampleRequest, Weights
from skillsd.engines.torch.engine import TorchEngine

T = TypeVar("T")

Sampled = list[tuple[int, float]]
"""Ids with their log-probs."""


def ids(count: int, seed: int) -> tuple[int, ...]:
    """Random tokens, none of which ends a turn."""
    return tuple(random.Random(seed).choices(range(30, 256), k=count))


async def play(
    engine: TorchEngine,
    *,
    episodes: int,
    seed: int = 0,
    turns: int = 4,
    prompt_tokens: int = 40,
    weights: Weights = "student",
    only: int | None = None,
) -> list[Sampled]:
    """Episodes of several turns, all at once; for each, what was sampled.

    Turns of one token, of few and of many; observations of 0 to 90 tokens, short ones more often; prompts that groups
    of three share; temperatures 1, 0.7 and 0. Nothing depends on time, so two decoders get the same requests as long as
    they sample the same tokens.

    Args:
        only: play this one of the episodes alone.
    """

    async def episode(number: int) -> Sampled:
        rng = random.Random(seed * 1000 + number)
        tokens = list(ids(prompt_tokens - number // 3, seed + number // 3))
        found: Sampled = []
        for turn in range(turns):
            most = rng.choice([1, 1, 3, 9, 30])
            temperature = (1.0, 0.7, 0.0)[number % 3]
            request = SampleRequest(tuple(tokens), most, number * 100 + turn, temperature, f"e{number}", weights)
            sample = await engine.sample(request)
            found += zip(sample.tokens, sample.logprobs, strict=True)
            tokens += [*sample.tokens, *ids(rng.choice([0, 1, 5, 14, 16, 17, 40, 90]), rng.randrange(99))]
        engine.end_session(f"e{number}")
        return found

    numbers = range(episodes) if only is None else [only]
    return list(await asyncio.gather(*(episode(number) for number in numbers)))


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; fail instead of waiting for ever."""

    async def bounded() -> T:
        async with asyncio.timeout(120):
            return await work

    return asyncio.run(bounded())
