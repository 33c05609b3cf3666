"""The environment interface: `Environment` runs one episode, `TaskSet` lists the tasks.

Environments don't depend on models, tokens, the skill bank or training methods. `skillsd.envs.conformance` checks an
implementation against the contract documented here, and `skillsd.envs.checked` applies the same checks in every run.
Numbers and booleans may be numpy's or torch's: they are converted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from skillsd.errors import UserError
from skillsd.types import Demonstration, Message, Skill, Task, Tool, Trajectory

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """The result of one action.

    Attributes:
        observation: text shown to the agent next. Invalid actions are reported here, never as an exception.
        done: whether the episode is over.
        reward: completion so far, in [0, 1]: a running value, not an increment. The value of the last step is the
            trajectory's reward R_i.
        success: whether every sub-goal is reached; implies ``reward == 1`` and ``done``.
        info: structured facts about the step for summarisers and viewers; JSON-serialisable.
    """

    observation: str
    done: bool
    reward: float
    success: bool
    info: Mapping[str, Any] = field(default_factory=dict)


class Environment(ABC):
    """Runs one episode at a time: `reset`, `step` until done, `close`. Can be reset for another episode."""

    @abstractmethod
    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Set up the task and return the first prompt. Deterministic given the task and the seed."""

    @abstractmethod
    async def step(self, action: str) -> Step:
        """Apply the agent's text. Any text is accepted; an invalid action changes nothing and gets an explanation."""

    async def close(self) -> None:  # noqa: B027 (most environments have nothing to close)
        """Release the episode's resources. Idempotent."""


def evenly_spaced(items: Sequence[T], count: int | None) -> Sequence[T]:
    """`count` of `items`, evenly spaced, in order; all of them for None or if there are fewer.

    Panels are sorted from easy to hard, so taking the first `count` would select the easiest tasks.
    """
    if count is None or count >= len(items):
        return items
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


async def play_through(environment: Environment, task: Task, actions: Sequence[str]) -> list[Step]:
    """Play a fixed list of actions, until they or the episode end, and close the environment."""
    try:
        await environment.reset(task, 0)
        steps: list[Step] = []
        for action in actions:
            steps.append(await environment.step(action))
            if steps[-1].done:
                break
        return steps
    finally:
        await environment.close()


class TaskSet(ABC):
    """An environment's tasks by split, with its optional extras: summariser, oracle, demonstrations.

    The constructor takes a recipe's ``environment.options`` as keyword arguments and raises
    `skillsd.errors.UserError` for an invalid one.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Names of the splits. Training, the skill bank and skills use ``train`` only."""

    @property
    @abstractmethod
    def max_turns(self) -> int:
        """Maximum number of turns in an episode."""

    @property
    def slowest_call(self) -> float:
        """Longest `reset` or `step` in seconds under the environment's own deadlines; 0 if it has none.

        ``rollout.step_seconds`` must be longer, or a slow action would be counted as an infrastructure failure.
        """
        return 0.0

    @property
    def tools(self) -> Sequence[Tool]:
        """The tools that the agent can call. With any, `Environment.step` gets its calls as JSON: see `envs.tools`.

        The model's chat template shows them to the agent: the first prompt does not repeat them.
        """
        return ()

    @abstractmethod
    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split, in a fixed order. Raises UserError for an unknown split."""

    def check_machine(self) -> None:  # noqa: B027 (most environments run everywhere)
        """Check that this machine can play episodes; called before a run, a warm start or an evaluation starts.

        Raises:
            UserError: if something is missing, with what to do.
        """

    @abstractmethod
    def make(self) -> Environment:
        """Create an environment.

        Raises:
            UserError: if this machine can't play episodes; other errors count as infrastructure failures.
        """

    def fingerprint(self, split: str) -> str:
        """Hash of a split's tasks and rules (16 hex digits). Results are comparable only if fingerprints match."""
        tasks = [[task.id, dict(task.payload)] for task in self.tasks(split)]
        tools = [dataclasses.asdict(tool) for tool in self.tools]
        parts = [self.name, tasks, self.max_turns, dict(self.rules_in_words()), *([tools] if tools else [])]
        content = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def rules_in_words(self) -> Mapping[str, Any]:
        """Whatever else affects results (prompt style, actions per turn, wording of the texts ...); JSON-serialisable.

        Part of the `fingerprint`. To cover the wording, add a hash of some texts, or a version that you raise.
        """
        return {}

    def for_people(self) -> TaskSet:
        """The same tasks, rendered for human players (`skillsd envs play`)."""
        return self

    def skill_for_people(self, task: Task, skill: Skill) -> Skill:
        """A skill of this environment's summariser in words for human readers, if it is in a shorthand for a model."""
        return skill

    def picture(self, trajectory: Trajectory, turn: int | None) -> Mapping[str, Any] | None:
        """What a turn looks like, for `skillsd show` and the page of `skillsd report`; None shows the plain texts.

        Drawn from the trajectory alone (``turns[turn].info``): nothing is played again. One of these, as JSON:

        - ``{"kind": "grid", "rows": ["#@$.#"], "legend": {"#": "wall"}}``: a board, a character per cell. The optional
          legend names the characters; the page draws wall, floor, target, player, box, "player on target" and "box on
          target" as shapes, any other as the character with its name.
        - ``{"kind": "code", "input": "print(1)", "output": "1", "error": None}``: what was run and what came back. The
          error (its text) is optional.
        - ``{"kind": "text", "text": "..."}``: text with its line breaks.

        Each may have a ``caption``, one line of text.

        Args:
            turn: index into ``trajectory.turns``: the state after this turn; None: before the first one.
        """
        return None

    def summariser(self) -> Callable[[Trajectory], Skill | None] | None:
        """A rule-based summariser of this environment's trajectories (no language model), or None.

        It gets finished episodes only, successes and failures, and none that the infrastructure broke.
        """
        return None

    def oracle(self, task: Task) -> str | None:
        """A reference solution as text (the privileged context of OPSD), or None."""
        return None

    def golden_skill(self, task: Task) -> Skill | None:
        """An ideal skill for this task, or None. By default, the oracle as the golden workflow.

        Used to check after a warm start that the model follows skills; never used in training. Override it if the
        summariser's skills are formatted differently from the oracle.
        """
        oracle = self.oracle(task)
        return Skill("", "", oracle) if oracle else None

    def wrong_skill(self, task: Task) -> Skill | None:
        """A skill for this task that is wrong and looks like a right one, or None (then another task's skill is used).

        A control for whether a model reads its skill: override it if another task's skill may help with this one.
        """
        return None

    def practice(self, *, seed: int) -> tuple[Task, Skill]:
        """A training task that can only be solved by reading the skill, and that skill (``reading.source: practice``).

        What the skill says must differ from seed to seed, and hold in no other task. The task needs an id of its own.

        Raises:
            UserError: if the environment has no such tasks.
        """
        raise UserError(f"the environment {self.name!r} has no practice tasks for reading")

    def scenario(self, task: Task) -> str | None:
        """Name of the task's scenario, for environments whose tasks are variants of scenarios; else None."""
        return None

    def secrets(self, task: Task) -> Sequence[str]:
        """Strings that must not appear in a skill for this task, such as its final answer.

        Skills that contain one are rejected. List only distinctive strings: the secret "3" would reject every skill
        that contains a 3.
        """
        return ()

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        """An infinite stream of demonstrations for the warm start."""
        raise UserError(f"the environment {self.name!r} has no demonstrations to train on")
