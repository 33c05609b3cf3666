"""One episode: an actor plays in an environment, and what it sampled is kept as it was sampled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol, TypeVar

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


class ActorFailedError(Exception):
    """Who acts could not: the infrastructure behind it broke. The episode then carries no reward."""


class Part(ABC):
    """An actor's part in one episode: says actions, hears the answers.

    Attributes:
        tokens, mask, logprobs, prompt_length: as of `Trajectory`; empty for an actor that knows no token ids.
        said: where the last action stands in `tokens`.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.mask: list[bool] = []
        self.logprobs: list[float] = []
        self.prompt_length = 0
        self.said = (0, 0)

    @abstractmethod
    async def act(self, number: int) -> str | None:
        """The action of turn `number` (from 0); None where the budget of tokens leaves no room for one.

        Raises:
            ActorFailedError: if the episode is lost for reasons that are not its own.
        """

    @abstractmethod
    def hear(self, observation: str) -> None:
        """The environment's answer, when the episode goes on."""

    def end(self) -> None:  # noqa: B027 (not every actor holds something)
        """The episode is over."""


class Player(Protocol):
    """Whoever can play episodes, many at once."""

    @property
    def temperature(self) -> float: ...

    def begin(
        self, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str = ""
    ) -> Part: ...


@dataclass(frozen=True)
class Actor:
    """A `Player` of token ids: the engine, which of its weights, under what temperature."""

    engine: Engine
    renderer: ChatRenderer
    temperature: float = 1.0
    weights: Weights = "student"

    def begin(
        self, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str = ""
    ) -> TokenPart:
        return TokenPart(self, prompt, budget, seed=seed, session=session, context=context)


class TokenPart(Part):
    """Token-in, token-out: ids are only ever appended, the sampled ones as they were sampled."""

    def __init__(
        self, actor: Actor, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str
    ) -> None:
        super().__init__()
        self._actor, self._budget, self._seed, self._session = actor, budget, seed, session
        self._append(actor.renderer.prompt(with_context(prompt, context) if context else prompt), None)
        self.prompt_length = len(self.tokens)
        self._most = budget.trajectory_tokens
        if context:  # who is told more may say as much
            extra = self.prompt_length - len(actor.renderer.prompt(prompt))
            self._most = min(self._most + extra, actor.engine.max_length)
        self._heard: tuple[int, ...] = ()  # the environment's last words: they join the tokens when a turn follows them

    async def act(self, number: int) -> str | None:
        room = min(self._budget.turn_tokens, self._most - len(self.tokens) - len(self._heard))
        if room <= 0:
            return None
        self._append(self._heard, None)
        sample = await self._actor.engine.sample(
            SampleRequest(
                tokens=tuple(self.tokens),
                max_tokens=room,
                seed=derive_seed(self._seed, number),
                temperature=self._actor.temperature,
                session=self._session,
                weights=self._actor.weights,
            )
        )
        start = len(self.tokens)
        self._append(sample.tokens, sample.logprobs)
        self.said = (start, len(self.tokens))
        return self._actor.renderer.text(sample.tokens)

    def hear(self, observation: str) -> None:
        self._heard = self._actor.renderer.observation(observation, self.tokens[-1])

    def end(self) -> None:
        self._actor.engine.end_session(self._session)

    def _append(self, ids: tuple[int, ...], logprobs: tuple[float, ...] | None) -> None:
        self.tokens.extend(ids)
        self.mask.extend([logprobs is not None] * len(ids))
        self.logprobs.extend(logprobs if logprobs is not None else [0.0] * len(ids))


async def run_episode(
    actor: Player,
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
    outcome ``env_error`` or ``timeout``, which carries no reward. So does an actor whose own infrastructure broke.
    """
    prompt: tuple[Message, ...] = ()
    part: Part = _Silent()
    turns: list[Turn] = []
    score, success, error = 0.0, False, ""
    outcome = Outcome.TRUNCATED_TURNS
    try:
        prompt = await _in_time(environment.reset(task, environment_seed), budget.step_seconds, "reset")
        part = actor.begin(prompt, budget, seed=seed, session=session, context=context)
        for number in range(budget.turns):
            action = await part.act(number)
            if action is None:
                outcome = Outcome.TRUNCATED_TOKENS
                break
            step = await _in_time(_checked(environment.step(action)), budget.step_seconds, f"step {number}")
            turns.append(Turn(action, step.observation, *part.said, step.info))
            score, success = step.score, step.success
            if step.done:
                outcome = Outcome.SOLVED if success else Outcome.FAILED
                break
            part.hear(step.observation)
    except _DeadlineMissedError as missed:
        outcome, error = Outcome.TIMEOUT, str(missed)
    except (_EnvironmentFailedError, ActorFailedError) as failed:
        outcome, error = Outcome.ENV_ERROR, str(failed)
    finally:
        part.end()
        await _close(environment, budget.step_seconds)
    return Trajectory(
        task=task,
        prompt=prompt,
        tokens=tuple(part.tokens),
        action_mask=tuple(part.mask),
        logprobs=tuple(part.logprobs),
        prompt_length=part.prompt_length,
        turns=tuple(turns),
        outcome=outcome,
        score=score,
        success=success,
        seed=seed,
        error=error,
    )


class _Silent(Part):
    """Before an episode has begun."""

    async def act(self, number: int) -> str | None:
        return None

    def hear(self, observation: str) -> None:
        pass


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
    step.observation.encode()  # half a surrogate pair is no text that a tokenizer takes
    json.dumps(dict(step.info))  # it is going to be kept as JSON
    if not (math.isfinite(step.score) and 0 <= step.score <= 1):
        raise ValueError(f"the score is {step.score}, expected 0 to 1")
    return step


async def _close(environment: Environment, seconds: float) -> None:
    # An environment that can't even be closed has had its episode; the trajectory is what counts.
    with contextlib.suppress(_DeadlineMissedError, _EnvironmentFailedError):
        await _in_time(environment.close(), seconds, "close")
