"""The policy interface: a `Policy` shared by many episodes, with an `EpisodeState` for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from skillsd.config import RolloutSection
from skillsd.envs.base import TaskSet
from skillsd.types import Message


@dataclass(frozen=True)
class Budget:
    """Limits of one episode.

    If an observation leaves no room for another turn, the episode ends, and the observation's tokens are not part of
    the trajectory.

    Attributes:
        turns: maximum number of turns.
        turn_tokens: maximum number of sampled tokens per turn.
        trajectory_tokens: maximum length of the trajectory in tokens, prompt included.
        step_seconds: deadline of each call to the environment, in seconds.
    """

    turns: int
    turn_tokens: int
    trajectory_tokens: int
    step_seconds: float = 60.0

    @classmethod
    def of(cls, options: RolloutSection, task_set: TaskSet, max_length: int) -> Budget:
        """The budget of a recipe on a task set, for a model that takes at most `max_length` tokens."""
        return cls(
            turns=task_set.max_turns,
            turn_tokens=options.turn_tokens,
            trajectory_tokens=min(options.trajectory_tokens, max_length),
            step_seconds=options.step_seconds,
        )


class PolicyFailedError(Exception):
    """The infrastructure behind a policy failed, so the episode carries no reward."""


class EpisodeState(ABC):
    """A policy's state in one episode.

    Attributes:
        tokens, mask, logprobs, prompt_length, versions: as in `Trajectory`; empty for a policy without token ids.
        action_span: start and end of the last action in `tokens`.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.mask: list[bool] = []
        self.logprobs: list[float] = []
        self.prompt_length = 0
        self.versions: tuple[int, int] | None = None
        self.action_span = (0, 0)

    @abstractmethod
    async def act(self, turn: int) -> str | None:
        """The action of turn `turn` (from 0); None if the token budget leaves no room for one.

        Raises:
            PolicyFailedError: if the infrastructure behind the policy failed.
        """

    @abstractmethod
    def observe(self, observation: str) -> None:
        """Take in the environment's observation. Not called after the last turn."""

    def end(self) -> None:  # noqa: B027 (optional to override)
        """Release what is held for the episode, e.g. a KV cache."""


class Policy(Protocol):
    """Plays episodes, many at once."""

    @property
    def temperature(self) -> float: ...

    def begin(
        self, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str = ""
    ) -> EpisodeState:
        """Start an episode.

        Args:
            prompt: the first messages.
            seed: for sampling.
            session: a name, unique among the episodes in progress.
            context: text added to the first prompt.
        """
        ...
