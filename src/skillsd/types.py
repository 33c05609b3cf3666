"""The nouns that every room of the house shares. Frozen dataclasses, plain Python, no torch.

Token sequences are tuples of ints; what belongs to a token (its mask, its log-prob) is a tuple of the same length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

TRAIN_SPLIT = "train"
"""The only split whose tasks may enter training, the skill bank or a skill."""


@dataclass(frozen=True)
class Message:
    """One message of a chat, as a chat template takes it."""

    role: Role
    content: str


@dataclass(frozen=True)
class Task:
    """One task x: what an episode is about.

    Attributes:
        id: unique within the environment and stable for ever (Sokoban: the hash of the level's content).
        env: name of the environment that plays it.
        split: ``train``, or the name of an evaluation split (``tune``, ``test`` ...).
        payload: what the environment needs to set the task up; JSON-able.
        difficulty: larger is harder; the curriculum sorts by it (Sokoban: length of the optimal solution in moves).
    """

    id: str
    env: str
    split: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    difficulty: float = 0.0


class Outcome(StrEnum):
    """How a trajectory ended. Only the first four carry a reward; the last two are the infrastructure's failures."""

    SOLVED = "solved"
    FAILED = "failed"  # the environment ended the episode without success
    TRUNCATED_TURNS = "truncated_turns"
    TRUNCATED_TOKENS = "truncated_tokens"
    ENV_ERROR = "env_error"
    TIMEOUT = "timeout"

    @property
    def has_reward(self) -> bool:
        return self not in (Outcome.ENV_ERROR, Outcome.TIMEOUT)


@dataclass(frozen=True)
class Turn:
    """One turn of the student and the environment's answer.

    Attributes:
        action: the sampled ids ``tokens[start:end]``, decoded (for people and summarisers; never encoded again).
        observation: what the environment answered; of the last turn too, though no model ever reads that one.
        start, end: where the action's tokens stand in the trajectory's ``tokens``.
        info: the environment's structured account of the turn, JSON-able (see the environment's docs).
    """

    action: str
    observation: str
    start: int
    end: int
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """A finished episode. It owns its token ids: they are never decoded and encoded again on the way to a loss.

    The episode of an actor that knows no token ids (a model behind an endpoint) has none.

    Attributes:
        task: the task that was played.
        prompt: the messages that the student was shown first; rendered, they are ``tokens[:prompt_length]``.
        tokens: all ids in order: prompt, sampled, environment, sampled ...
        action_mask: True where the student sampled the token.
        logprobs: log pi_old of each sampled token under the sampling distribution; 0.0 elsewhere.
        turns: the turns in order.
        outcome: how it ended.
        score: completion in [0, 1], the share of sub-goals reached. This is the reward R_i.
        success: full success (accuracy counts these).
        seed: seed of the episode; with the weights, it determines the episode.
        error: what went wrong, for ``env_error`` and ``timeout``.
    """

    task: Task
    prompt: tuple[Message, ...]
    tokens: tuple[int, ...]
    action_mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    prompt_length: int
    turns: tuple[Turn, ...]
    outcome: Outcome
    score: float
    success: bool
    seed: int
    error: str = ""

    @property
    def action_tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(self.action_mask)


@dataclass(frozen=True)
class Group:
    """G trajectories of one task, sampled by the same policy: what GRPO compares."""

    task: Task
    trajectories: tuple[Trajectory, ...]

    @property
    def rewards(self) -> list[float]:
        return [trajectory.score for trajectory in self.trajectories]


@dataclass(frozen=True)
class Skill:
    """A trajectory's lesson in natural language, e = Analyze(trajectory, x). Never the trajectory itself.

    Attributes:
        success_analysis: what worked, and which actions were right.
        mistake_analysis: where it went wrong.
        golden_workflow: the steps to follow next time.
    """

    success_analysis: str
    mistake_analysis: str
    golden_workflow: str

    @property
    def is_empty(self) -> bool:
        return not (self.success_analysis or self.mistake_analysis or self.golden_workflow)


@dataclass(frozen=True)
class DemonstrationTurn:
    """One turn of a demonstration. ``learn`` is False where the action is noise, shown but not imitated."""

    action: str
    observation: str
    learn: bool = True


@dataclass(frozen=True)
class Demonstration:
    """An episode to imitate in the warm start, with the skill that its actor followed, if any."""

    task: Task
    prompt: tuple[Message, ...]
    turns: tuple[DemonstrationTurn, ...]
    skill: Skill | None = None
