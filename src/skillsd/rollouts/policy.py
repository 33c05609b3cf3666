"""What plays an episode: a policy, which many episodes share, and the state of its side of one episode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from skillsd.config import RolloutSection
from skillsd.envs.base import TaskSet
from skillsd.types import Message


@dataclass(frozen=True)
class Budget:
    """What an episode may use.

    An observation that leaves no room for another turn ends the episode and is not among its tokens.

    Attributes:
        turns: the most turns.
        turn_tokens: the most sampled tokens of one turn.
        trajectory_tokens: the most tokens of the trajectory, prompt included.
        step_seconds: deadline of each call to the environment.
    """

    turns: int
    turn_tokens: int
    trajectory_tokens: int
    step_seconds: float = 60.0

    @classmethod
    def of(cls, options: RolloutSection, task_set: TaskSet, max_length: int) -> Budget:
        """A recipe's budget on these tasks, for a model that takes `max_length` tokens."""
        return cls(
            turns=task_set.max_turns,
            turn_tokens=options.turn_tokens,
            trajectory_tokens=min(options.trajectory_tokens, max_length),
            step_seconds=options.step_seconds,
        )


class PolicyFailedError(Exception):
    """The infrastructure behind a policy broke, so the episode carries no reward."""


class EpisodeState(ABC):
    """A policy's side of one episode: it acts and observes.

    Attributes:
        tokens, mask, logprobs, prompt_length, versions: as in `Trajectory`; empty for a policy without token ids.
        action_span: where the last action stands in `tokens`.
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
        """The action of turn number `turn` (from 0); None if the token budget leaves no room for one.

        Raises:
            PolicyFailedError: if the episode is lost for reasons outside of it.
        """

    @abstractmethod
    def observe(self, observation: str) -> None:
        """Take the environment's observation, when the episode goes on."""

    def end(self) -> None:  # noqa: B027 (not every policy holds something)
        """The episode is over."""


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
            seed: of what is sampled.
            session: a name that no other episode under way has.
            context: text added to the first prompt.
        """
        ...
