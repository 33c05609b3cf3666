"""What an environment is: `Environment` plays one episode, `TaskSet` says which tasks there are.

Environments know nothing of models, tokens, skills' banks or methods. `skillsd.envs.conformance` checks that an
implementation keeps the promises written here.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from skillsd.types import Demonstration, Message, Skill, Task, Trajectory

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """The environment's answer to one action.

    Attributes:
        observation: what the agent is shown next, in words. An invalid action is answered here, never by an exception.
        done: the episode is over.
        reward: completion so far, in [0, 1]: a running value, not an increment. The last step's is the trajectory's
            reward R_i.
        success: every sub-goal is reached (then ``reward`` is 1 and ``done`` is True).
        info: structured account of the step for summarisers and viewers; JSON-able.
    """

    observation: str
    done: bool
    reward: float
    success: bool
    info: Mapping[str, Any] = field(default_factory=dict)


class Environment(ABC):
    """One episode at a time: `reset`, then `step` until done, then `close`. May be reset again after an episode."""

    @abstractmethod
    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Set the task up and return the first prompt. The same task and seed give the same episode."""

    @abstractmethod
    async def step(self, action: str) -> Step:
        """Take the agent's text. Any text is legal; an unusable one is answered in words and changes nothing."""

    async def close(self) -> None:  # noqa: B027 (most environments hold nothing that needs closing)
        """Free what the episode holds. Closing twice is harmless."""


def evenly_spaced(items: Sequence[T], count: int | None) -> Sequence[T]:
    """`count` of `items`, evenly spaced, in their order; all of them for None or if there are fewer.

    Panels go from easy to hard, so the first `count` would be the easiest.
    """
    if count is None or count >= len(items):
        return items
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


class TaskSet(ABC):
    """The tasks of one environment by split, and what its package brings along.

    The constructor takes the options that a recipe gives under ``environment.options`` as keyword arguments, and
    raises `skillsd.errors.UserError` for a bad one.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Names of the splits. ``train`` is the only one that training, the bank and skills may touch."""

    @property
    @abstractmethod
    def max_turns(self) -> int:
        """The most turns an episode may take."""

    @property
    def slowest_call(self) -> float:
        """Seconds that a `reset` or `step` may take by the environment's own deadlines; 0 if it has none.

        With a shorter ``rollout.step_seconds`` an agent's slow action would pass for a failure of the infrastructure.
        """
        return 0.0

    @abstractmethod
    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split, always in the same order. Raises UserError for an unknown split."""

    @abstractmethod
    def make(self) -> Environment:
        """A fresh environment."""

    def fingerprint(self, split: str) -> str:
        """Identifies a split's tasks and the rules they are played by: other fingerprints, results not comparable."""
        tasks = [[task.id, dict(task.payload)] for task in self.tasks(split)]
        content = json.dumps([tasks, self.max_turns, dict(self.rules_in_words())], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def rules_in_words(self) -> Mapping[str, Any]:
        """Whatever else makes results comparable or not (wording, actions a turn ...), JSON-able."""
        return {}

    def for_people(self) -> TaskSet:
        """The same tasks as a person would like to be shown them (`skillsd envs play`)."""
        return self

    def summariser(self) -> Callable[[Trajectory], Skill | None] | None:
        """A rule-based summariser of this environment's trajectories (no language model), if it has one."""
        return None

    def oracle(self, task: Task) -> str | None:
        """A reference solution in words (the privileged context of OPSD), if there is one."""
        return None

    def golden_skill(self, task: Task) -> Skill | None:
        """The best skill that this task could have, if it is known: the oracle as a workflow.

        Asks whether a model follows skills at all (the check of a warm start); never a part of training. Override it
        where the skills that the summariser writes look different from the oracle.
        """
        oracle = self.oracle(task)
        return Skill("", "", oracle) if oracle else None

    def scenario(self, task: Task) -> str | None:
        """Name of the scenario that the task is a variant of, if tasks come as variants of scenarios."""
        return None

    def secrets(self, task: Task) -> Sequence[str]:
        """What no skill of the task may say: its final answer, say. A skill that does is refused.

        Name only what is telling: with "3" as a secret, every skill that says "3" is refused.
        """
        return ()

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        """An endless stream of episodes to imitate in the warm start."""
        raise NotImplementedError(f"environment {self.name!r} brings no demonstrations")
