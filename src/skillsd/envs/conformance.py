"""Checks an environment against the contract in `skillsd.envs.base`. For authors of environments.

Call ``assert_conforms(MyTaskSet())`` in a test. Each problem states what was expected and what was found. Values are
checked as in a run (`skillsd.envs.values`): numbers and booleans of numpy and torch are fine.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from skillsd import user_code
from skillsd.envs import values
from skillsd.envs.base import Environment, TaskSet
from skillsd.envs.checked import CheckedTaskSet
from skillsd.errors import UserError
from skillsd.types import TRAIN_SPLIT, Outcome, Task, Trajectory, Turn

T = TypeVar("T")

BAD_ACTIONS = ("", "   \n", "word " * 20_000, "\N{SNOWMAN}\u202e\x00", "<action>", "no such action at all")
"""Invalid actions of the kind that models produce. `step` has to respond with an observation, not an exception."""


@dataclass(frozen=True)
class Problem:
    """A contract violation.

    Attributes:
        check: short name of the check, stable across versions.
        message: what was expected and what was found.
    """

    check: str
    message: str

    def __str__(self) -> str:
        return f"[{self.check}] {self.message}"


def check(
    task_set: TaskSet,
    *,
    split: str | None = None,
    episodes: int = 3,
    seed: int = 0,
    actions: Sequence[str] = (),
    demonstrations: int = 2,
) -> list[Problem]:
    """Run all checks. Returns the violations found; empty if there are none.

    Args:
        split: split to take the tasks from; ``train`` by default.
        episodes: number of tasks to play.
        seed: seed of the episodes and of the choice of actions.
        actions: valid actions in this environment. Without them only invalid actions are tried, which covers little
            of the environment. The actions in ``task_set.shortcuts``, if any, are added.
        demonstrations: number of demonstrations to check, if the environment has any.
    """
    if isinstance(task_set, CheckedTaskSet):
        task_set = task_set.inner  # the checks are made here
    checker = _Checker(task_set)
    checker.check_tasks()
    if checker.problems:
        return list(checker.problems)  # the episode checks rely on valid tasks
    split = split or TRAIN_SPLIT
    tasks = values.tasks(task_set.tasks(split), split)[:episodes]
    shortcuts: dict[str, str] = dict(getattr(task_set, "shortcuts", {}))
    useful = [*actions, *shortcuts.values()] or ["no such action"]
    asyncio.run(checker.check_episodes(tasks, seed, useful))
    checker.check_warm_start(tasks[0], demonstrations, seed)
    return list(checker.problems)


def assert_conforms(task_set: TaskSet, **options: Any) -> None:
    """Raise AssertionError listing every violation. The options are those of `check`."""
    problems = check(task_set, **options)
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise AssertionError(f"{type(task_set).__name__} fails {len(problems)} checks:\n{listed}")


class _Checker:
    """Collects problems, in order and without duplicates (as the keys of a dict)."""

    def __init__(self, task_set: TaskSet) -> None:
        self._task_set = task_set
        self.problems: dict[Problem, None] = {}

    def _expect(self, holds: bool, name: str, expected: str, found: object) -> None:
        if not holds:
            self.problems[Problem(name, f"expected {expected}; found {found!s:.200}")] = None

    def _valid(self, name: str, work: Callable[[], T]) -> T | None:
        """The result of a check in `skillsd.envs.values`; None if the value is invalid or the call raises."""
        try:
            return work()
        except values.InvalidError as error:
            self._expect(False, error.check, error.expected, f"{error.where} is {error.found}")
        except (Exception, SystemExit) as error:
            self._expect(False, name, "no exception", user_code.describe(error))
        return None

    def check_tasks(self) -> None:
        """Checks that need no episode."""
        given = self._task_set
        self._valid("name", lambda: values.text(getattr(given, "name", None), "name", empty=False))
        self._valid("max_turns", lambda: values.count(given.max_turns, "max_turns"))
        self._valid("slowest_call", lambda: values.number(given.slowest_call, "slowest_call", low=0))
        self._valid("rules_in_words", lambda: values.json_object(given.rules_in_words(), "rules_in_words"))
        self._valid("tools", lambda: values.tools(given.tools))
        self._valid("summariser", lambda: values.optional_function(given.summariser(), "summariser"))
        splits = self._valid("splits", lambda: values.splits(given.splits)) or ()
        self._expect(TRAIN_SPLIT in splits, "splits", f"{TRAIN_SPLIT!r} among the splits", splits)
        self._check_unknown_split()
        owner: dict[str, str] = {}
        for split in splits:
            self._check_split(split, owner)

    def _check_split(self, split: str, owner: dict[str, str]) -> None:
        tasks = self._valid("tasks", lambda: values.tasks(self._task_set.tasks(split), split))
        if tasks is None:
            return
        again = self._valid("tasks", lambda: values.tasks(self._task_set.tasks(split), split))
        shared = sorted({task.id for task in tasks} & owner.keys())
        self._expect(bool(tasks), "tasks", f"tasks in split {split!r}", "none")
        self._expect(again == tasks, "stable_tasks", f"the same {split!r} tasks on every call", "different tasks")
        self._expect(not shared, "disjoint", "no task in two splits", f"{shared[:3]} in {split!r} too")
        owner.update({task.id: split for task in tasks})
        for task in tasks:
            self._check_task(task)

    def _check_task(self, task: Task) -> None:
        given, whose = self._task_set, f"of task {task.id!r}"
        self._valid("secrets", lambda: values.texts(given.secrets(task), "secrets", f"secrets {whose}"))
        self._valid("oracle", lambda: values.optional_text(given.oracle(task), "oracle", f"oracle {whose}"))
        self._valid("scenario", lambda: values.optional_text(given.scenario(task), "scenario", f"scenario {whose}"))

    def _check_unknown_split(self) -> None:
        found = "no error"
        try:
            self._task_set.tasks("no such split")
        except UserError:
            return
        except Exception as error:
            found = user_code.describe(error)
        self._expect(False, "unknown_split", "UserError for an unknown split", found)

    def check_warm_start(self, task: Task, demonstrations: int, seed: int) -> None:
        """Checks of what only `skillsd sft` uses, and which may be slow."""
        given = self._task_set
        self._valid("golden_skill", lambda: values.skill(given.golden_skill(task), "golden_skill", "the result"))
        if type(given).demonstrations is TaskSet.demonstrations:
            return
        stream = self._valid("demonstrations", lambda: given.demonstrations(TRAIN_SPLIT, seed=seed))
        for _ in range(demonstrations if stream else 0):
            self._valid("demonstrations", lambda: values.demonstration(next(stream)))  # type: ignore[arg-type]

    async def check_episodes(self, tasks: list[Task], seed: int, useful: list[str]) -> None:
        """Play each task twice in new environments and with invalid actions, then twice in a reused one.

        No two episodes are open at a time: a server may have room for one only.
        """
        reused = self._task_set.make()
        if not isinstance(reused, Environment):
            self._expect(False, "make", "an Environment from make()", repr(reused))
            return
        first: dict[str, list[Any] | None] = {}
        scripts: dict[str, list[str]] = {}
        for number, task in enumerate(tasks):
            rng = random.Random(seed + number)
            script = [useful[int(rng.random() * len(useful))] for _ in range(self._task_set.max_turns)]
            scripts[task.id] = script
            first[task.id] = await self._in_a_new_one("episode", task, seed, script)
            second = await self._in_a_new_one("episode", task, seed, script)
            self._expect(
                first[task.id] == second,
                "deterministic",
                "the same episode for the same task, seed and actions",
                "a different episode",
            )
            self._check_pictures(task, seed, script, first[task.id] or [])
            for bad in BAD_ACTIONS:
                await self._in_a_new_one("bad_action", task, seed, [bad])
        for task in tasks:
            # Abandon an episode, then reset: no state may carry over.
            await self._attempt("reset_again", reused, task, seed, scripts[task.id][:2])
            third = await self._attempt("reset_again", reused, task, seed, scripts[task.id])
            self._expect(
                first[task.id] == third,
                "reset_again",
                "reset() to clear all state",
                "another episode than in a new one",
            )
        await self._close(reused)

    async def _in_a_new_one(self, name: str, task: Task, seed: int, script: Sequence[str]) -> list[Any] | None:
        """`_attempt` in a new environment, which is closed at the end: it may hold one of few places of a server."""
        environment = self._task_set.make()
        found = await self._attempt(name, environment, task, seed, script)
        await self._close(environment)
        return found

    async def _close(self, environment: Environment) -> None:
        try:
            await environment.close()
            await environment.close()
        except Exception as error:
            self._expect(False, "close", "close() to be idempotent", user_code.describe(error))

    def _check_pictures(self, task: Task, seed: int, script: Sequence[str], played: Sequence[Any]) -> None:
        """Checks of what people see of the episode."""
        if not played:
            return
        prompt, *steps = played
        turns = [Turn(action, s.observation, 0, 0, s.info) for action, s in zip(script, steps, strict=False)]
        reward, success = (steps[-1].reward, steps[-1].success) if steps else (0.0, False)
        outcome = Outcome.SOLVED if success else Outcome.FAILED
        trajectory = Trajectory(task, prompt, (), (), (), 0, tuple(turns), outcome, reward, success, seed)
        for turn in (None, *range(len(turns))):
            self._valid("picture", partial(self._picture, trajectory, turn))

    def _picture(self, trajectory: Trajectory, turn: int | None) -> object:
        return values.picture(self._task_set.picture(trajectory, turn))

    async def _attempt(
        self, name: str, environment: Environment, task: Task, seed: int, script: Sequence[str]
    ) -> list[Any] | None:
        try:
            return await self._play(environment, task, seed, script)
        except values.InvalidError as error:
            self._expect(False, error.check, error.expected, f"{error.where} is {error.found}")
        except (Exception, SystemExit) as error:
            expected = "no exception from reset() or step(), whatever the action"
            self._expect(False, name, expected, user_code.describe(error))
        return None

    async def _play(self, environment: Environment, task: Task, seed: int, script: Sequence[str]) -> list[Any]:
        """Play the script and check every step. Returns the prompt and the steps."""
        results: list[Any] = [values.messages(await environment.reset(task, seed))]
        for action in script:
            step = values.step(await environment.step(action))
            shown = step.observation.strip()
            self._expect(bool(shown), "observation", "a non-empty text as the observation", repr(step.observation))
            results.append(step)
            if step.done:
                break
        return results
