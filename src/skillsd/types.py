"""The types that every package shares: frozen dataclasses, plain Python, no torch.

Token sequences are tuples of ints; per-token data (masks, log-probs) are tuples of the same length.
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
class Tool:
    """A function that the agent can call.

    Attributes:
        parameters: JSON schema of the arguments, an object.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One task x: what an episode is about.

    Attributes:
        id: unique within the environment, and the same in every version (Sokoban: the hash of the level's content).
        env: name of the environment that plays it.
        split: ``train``, or the name of an evaluation split (``tune``, ``test`` ...).
        payload: what the environment needs to set the task up; JSON.
        difficulty: larger is harder; the curriculum sorts by it (Sokoban: length of the optimal solution in moves).
    """

    id: str
    env: str
    split: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    difficulty: float = 0.0


class Outcome(StrEnum):
    """How a trajectory ended. The first four carry a reward; the last two are infrastructure failures."""

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
    """One action of the policy and the environment's observation.

    Attributes:
        action: the sampled ids ``tokens[start:end]``, decoded (for people and summarisers; never encoded again). In
            an environment with tools, JSON with the calls (`skillsd.envs.tools`).
        observation: the environment's answer; present for the last turn too, though no model reads that one.
        start, end: the action's span in the trajectory's ``tokens``.
        info: structured facts about the turn, JSON (see the environment's docs).
    """

    action: str
    observation: str
    start: int
    end: int
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """A finished episode. It keeps its token ids as sampled: they are never decoded and encoded again.

    An episode of a model behind an endpoint, whose token ids are unknown, has none.

    Attributes:
        task: the task that was played.
        prompt: the first messages under the plain prompt, without any added context.
        tokens: all ids in order: prompt, sampled, environment, sampled ...
        action_mask: True where the policy sampled the token.
        logprobs: log pi_old of each sampled token under the sampling distribution; 0.0 elsewhere.
        prompt_length: number of the first prompt's tokens.
        turns: the turns in order.
        outcome: how it ended.
        reward: R_i, the completion in [0, 1]: share of sub-goals reached.
        success: full success (accuracy counts these).
        seed: of the episode; with the weights, it determines the episode.
        error: what went wrong, for ``env_error`` and ``timeout``.
        versions: of the student's weights, the oldest and the newest that sampled it; None without samples.
    """

    task: Task
    prompt: tuple[Message, ...]
    tokens: tuple[int, ...]
    action_mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    prompt_length: int
    turns: tuple[Turn, ...]
    outcome: Outcome
    reward: float
    success: bool
    seed: int
    error: str = ""
    versions: tuple[int, int] | None = None

    @property
    def action_tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(self.action_mask)


@dataclass(frozen=True)
class Group:
    """G trajectories of one task, sampled by the same policy. GRPO compares their rewards."""

    task: Task
    trajectories: tuple[Trajectory, ...]

    @property
    def rewards(self) -> list[float]:
        return [trajectory.reward for trajectory in self.trajectories]


@dataclass(frozen=True)
class Skill:
    """A trajectory summarised in natural language, e = Analyze(trajectory, x). Never the trajectory itself.

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
    """One turn of a demonstration. ``learn`` is False if the action is noise: in the context, but not imitated."""

    action: str
    observation: str
    learn: bool = True


@dataclass(frozen=True)
class Demonstration:
    """An episode to imitate in the warm start, with the skill that it follows, if any."""

    task: Task
    prompt: tuple[Message, ...]
    turns: tuple[DemonstrationTurn, ...]
    skill: Skill | None = None
