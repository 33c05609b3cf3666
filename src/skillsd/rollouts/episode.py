"""One episode: a student acts in an environment, and what it sampled is kept as it was sampled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from skillsd.config import RolloutSection
from skillsd.engines.base import Engine, SampleRequest, Weights
from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.rollouts.tokens import ChatRenderer
from skillsd.seeds import derive_seed
from skillsd.skills.context import with_context
from skillsd.types import Message, Outcome, Task, Trajectory, Turn

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """What an episode may use. Tokens are counted apart for a turn and for the whole trajectory, prompt included.

    An observation that would leave no room for another turn ends the episode and is not among its tokens.
    """

    turns: int
    turn_tokens: int
    trajectory_tokens: int
    step_seconds: float = 60.0
    """Deadline of each call to the environment."""

    @classmethod
    def of(cls, options: RolloutSection, task_set: TaskSet, max_length: int) -> Budget:
        """A recipe's budget on these tasks, for a model that takes `max_length` tokens."""
        return cls(
            turns=task_set.max_turns,
            turn_tokens=options.turn_tokens,
            trajectory_tokens=min(options.trajectory_tokens, max_length),
            step_seconds=options.step_seconds,
        )


@dataclass(frozen=True)
class Actor:
    """Who samples, and how: the engine, which of its weights, under what temperature."""

    engine: Engine
    renderer: ChatRenderer
    temperature: float = 1.0
    weights: Weights = "student"


async def run_episode(
    actor: Actor,
    environment: Environment,
    task: Task,
    budget: Budget,
    *,
    seed: int,
    environment_seed: int,
    session: str,
    context: str = "",
) -> Trajectory:
    """Play `task` to its end.

    Args:
        seed: of what is sampled; `environment_seed` is the environment's.
        session: a name that no other episode under way has.
        context: text added to the first prompt (a skill, say); the trajectory's ``prompt`` stays the plain one. Its
            tokens come on top of the budget's, as far as the model takes them.

    Never raises for what the environment does: an exception or a missed deadline there ends the episode with the
    outcome ``env_error`` or ``timeout``, which carries no reward.
    """
    prompt: tuple[Message, ...] = ()
    tokens: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []
    turns: list[Turn] = []
    prompt_length = 0
    score, success, error = 0.0, False, ""
    outcome = Outcome.TRUNCATED_TURNS
    heard: tuple[int, ...] = ()  # the environment's last words: they join the tokens when a turn follows them

    def append(ids: tuple[int, ...], logprobs_: tuple[float, ...] | None) -> None:
        tokens.extend(ids)
        mask.extend([logprobs_ is not None] * len(ids))
        logprobs.extend(logprobs_ if logprobs_ is not None else [0.0] * len(ids))

    try:
        prompt = await _in_time(environment.reset(task, environment_seed), budget.step_seconds, "reset")
        append(actor.renderer.prompt(with_context(prompt, context) if context else prompt), None)
        prompt_length = len(tokens)
        most = budget.trajectory_tokens
        if context:  # who is told more may say as much
            most = min(most + prompt_length - len(actor.renderer.prompt(prompt)), actor.engine.max_length)
        for number in range(budget.turns):
            room = min(budget.turn_tokens, most - len(tokens) - len(heard))
            if room <= 0:
                outcome = Outcome.TRUNCATED_TOKENS
                break
            append(heard, None)
            sample = await actor.engine.sample(
                SampleRequest(
                    tokens=tuple(tokens),
                    max_tokens=room,
                    seed=derive_seed(seed, number),
                    temperature=actor.temperature,
                    session=session,
                    weights=actor.weights,
                )
            )
            start = len(tokens)
            append(sample.tokens, sample.logprobs)
            action = actor.renderer.text(sample.tokens)
            step = await _in_time(_checked(environment.step(action)), budget.step_seconds, f"step {number}")
            turns.append(Turn(action, step.observation, start, len(tokens), step.info))
            score, success = step.score, step.success
            if step.done:
                outcome = Outcome.SOLVED if success else Outcome.FAILED
                break
            heard = actor.renderer.observation(step.observation, sample.tokens[-1])
    except _DeadlineMissedError as missed:
        outcome, error = Outcome.TIMEOUT, str(missed)
    except _EnvironmentFailedError as failed:
        outcome, error = Outcome.ENV_ERROR, str(failed)
    finally:
        actor.engine.end_session(session)
        await _close(environment, budget.step_seconds)
    return Trajectory(
        task=task,
        prompt=prompt,
        tokens=tuple(tokens),
        action_mask=tuple(mask),
        logprobs=tuple(logprobs),
        prompt_length=prompt_length,
        turns=tuple(turns),
        outcome=outcome,
        score=score,
        success=success,
        seed=seed,
        error=error,
    )


class _EnvironmentFailedError(Exception):
    pass


class _DeadlineMissedError(Exception):
    pass


async def _in_time(call: Awaitable[T], seconds: float, what: str) -> T:
    """`call`'s result, with everything that can go wrong in an environment turned into two exceptions of ours."""
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            return await call
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # it is us who are stopped; otherwise the environment let a cancellation of its own escape
        raise _EnvironmentFailedError(f"{what}: cancelled") from error
    except Exception as error:
        if deadline.expired():
            raise _DeadlineMissedError(f"{what} took longer than {seconds:g} s") from error
        raise _EnvironmentFailedError(f"{what}: {type(error).__name__}: {error}") from error


async def _checked(call: Awaitable[Step]) -> Step:
    """The environment's answer, if it is one that can be trained on."""
    step = await call
    if not isinstance(step, Step):
        raise TypeError(f"expected a Step, got {type(step).__name__}")
    if not isinstance(step.observation, str):
        raise TypeError(f"the observation is {type(step.observation).__name__}, expected str")
    json.dumps(dict(step.info))  # it is going to be kept as JSON
    if not (math.isfinite(step.score) and 0 <= step.score <= 1):
        raise ValueError(f"the score is {step.score}, expected 0 to 1")
    return step


async def _close(environment: Environment, seconds: float) -> None:
    # An environment that can't even be closed has had its episode; the trajectory is what counts.
    with contextlib.suppress(_DeadlineMissedError, _EnvironmentFailedError):
        await _in_time(environment.close(), seconds, "close")
