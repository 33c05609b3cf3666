"""One episode: a policy plays in an environment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TypeVar

from skillsd.envs.base import Environment
from skillsd.envs.checked import EnvironmentFaultError, checked_environment
from skillsd.rollouts.deadline import DeadlineMissedError, within
from skillsd.rollouts.policy import Budget, EpisodeState, Policy, PolicyFailedError
from skillsd.types import Message, Outcome, Task, Trajectory, Turn

T = TypeVar("T")


async def run_episode(
    policy: Policy,
    environment: Environment,
    task: Task,
    budget: Budget,
    *,
    seed: int,
    environment_seed: int,
    session: str,
    context: str = "",
) -> Trajectory:
    """Play one episode of `task`.

    An exception, an invalid value or a missed deadline in the environment does not raise: it ends the episode with the
    outcome ``env_error`` or ``timeout``, which carries no reward. So does a `PolicyFailedError`.

    Args:
        seed: for sampling.
        environment_seed: for the environment.
        session: a name, unique among the episodes in progress.
        context: text added to the first prompt, e.g. a skill. The trajectory's ``prompt`` stays the plain one. The
            context's tokens do not count against the budget, up to the model's maximum length.
    """
    prompt: tuple[Message, ...] = ()
    state: EpisodeState = _NotStarted()
    turns: list[Turn] = []
    environment = checked_environment(environment)
    reward, success, error = 0.0, False, ""
    outcome = Outcome.TRUNCATED_TURNS
    try:
        prompt = await _in_time(environment.reset(task, environment_seed), budget.step_seconds, "reset")
        state = policy.begin(prompt, budget, seed=seed, session=session, context=context)
        for number in range(budget.turns):
            action = await state.act(number)
            if action is None:
                outcome = Outcome.TRUNCATED_TOKENS
                break
            step = await _in_time(environment.step(action), budget.step_seconds, f"step {number}")
            turns.append(Turn(action, step.observation, *state.action_span, step.info))
            reward, success = step.reward, step.success
            if step.done:
                outcome = Outcome.SOLVED if success else Outcome.FAILED
                break
            state.observe(step.observation)
    except DeadlineMissedError as missed:
        outcome, error = Outcome.TIMEOUT, str(missed)
    except (EnvironmentFaultError, PolicyFailedError) as failed:
        outcome, error = Outcome.ENV_ERROR, str(failed)
    finally:
        state.end()
        await _close(environment, budget.step_seconds)
    return Trajectory(
        task=task,
        prompt=prompt,
        tokens=tuple(state.tokens),
        action_mask=tuple(state.mask),
        logprobs=tuple(state.logprobs),
        prompt_length=state.prompt_length,
        turns=tuple(turns),
        outcome=outcome,
        reward=reward,
        success=success,
        seed=seed,
        error=error,
        versions=state.versions,
    )


class _NotStarted(EpisodeState):
    """The state until the environment has given the first prompt."""

    async def act(self, turn: int) -> str | None:
        return None

    def observe(self, observation: str) -> None:
        pass


async def _in_time(call: Awaitable[T], seconds: float, what: str) -> T:
    """The call's result; its failure is one of two exceptions."""
    try:
        return await within(seconds, call)
    except DeadlineMissedError as missed:
        raise DeadlineMissedError(f"{what} took longer than {seconds:g} s") from missed
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # this episode is cancelled; otherwise the exception is the environment's own
        raise EnvironmentFaultError(what, "cancelled by the environment itself") from error
    except EnvironmentFaultError as error:
        raise EnvironmentFaultError(what, error.reason) from error


async def _close(environment: Environment, seconds: float) -> None:
    # The episode is over, so a failure to close does not change its trajectory.
    with contextlib.suppress(DeadlineMissedError, EnvironmentFaultError):
        await _in_time(environment.close(), seconds, "close")
