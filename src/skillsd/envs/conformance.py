"""Checks an environment against the contract in `skillsd.envs.base`. For authors of environments.

Call ``assert_conforms(MyTaskSet())`` in a test. Each problem states what was expected and what was found.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.errors import UserError
from skillsd.types import TRAIN_SPLIT, Message, Task

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
) -> list[Problem]:
    """Run all checks. Returns the violations found; empty if there are none.

    Args:
        split: split to take the tasks from; ``train`` by default.
        episodes: number of tasks to play.
        seed: seed of the episodes and of the choice of actions.
        actions: valid actions in this environment. Without them only invalid actions are tried, which covers little
            of the environment. The actions in ``task_set.shortcuts``, if any, are added.
    """
    checker = _Checker(task_set)
    checker.check_tasks()
    if checker.problems:
        return list(checker.problems)  # the episode checks rely on valid tasks
    tasks = list(task_set.tasks(split or TRAIN_SPLIT))[:episodes]
    shortcuts: dict[str, str] = dict(getattr(task_set, "shortcuts", {}))
    useful = [*actions, *shortcuts.values()] or ["no such action"]
    asyncio.run(checker.check_episodes(tasks, seed, useful))
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

    def check_tasks(self) -> None:
        """Checks that need no episode."""
        turns, splits = self._task_set.max_turns, self._task_set.splits
        self._expect(isinstance(turns, int) and turns > 0, "max_turns", "a positive int", repr(turns))
        self._expect(TRAIN_SPLIT in splits, "splits", f"{TRAIN_SPLIT!r} among the splits", splits)
        self._check_unknown_split()
        owner: dict[str, str] = {}
        for split in splits:
            tasks = list(self._task_set.tasks(split))
            ids = [task.id for task in tasks]
            shared = sorted(set(ids) & owner.keys())
            again = list(self._task_set.tasks(split))
            self._expect(bool(tasks), "tasks", f"tasks in split {split!r}", "none")
            self._expect(len(set(ids)) == len(ids), "unique_ids", f"unique ids in split {split!r}", "repeats")
            self._expect(again == tasks, "stable_tasks", f"the same {split!r} tasks on every call", "different tasks")
            self._expect(not shared, "disjoint", "no task in two splits", f"{shared[:3]} in {split!r} too")
            owner.update(dict.fromkeys(ids, split))
            for task in tasks:
                self._expect(task.split == split, "task_split", f"task.split {split!r}", repr(task.split))
                self._expect(_is_json(task.payload), "payload", "a JSON-serialisable payload", repr(task.payload))
                secrets = self._task_set.secrets(task)
                texts = not isinstance(secrets, str) and all(isinstance(secret, str) for secret in secrets)
                self._expect(
                    texts, "secrets", "a sequence of strings", repr(secrets)
                )  # a plain string would pass as a sequence

    def _check_unknown_split(self) -> None:
        found = "no error"
        try:
            self._task_set.tasks("no such split")
        except UserError:
            return
        except Exception as error:
            found = repr(error)
        self._expect(False, "unknown_split", "UserError for an unknown split", found)

    async def check_episodes(self, tasks: list[Task], seed: int, useful: list[str]) -> None:
        """Play each task twice in new environments, twice in a reused one, and with invalid actions."""
        make = self._task_set.make
        reused = make()
        for number, task in enumerate(tasks):
            rng = random.Random(seed + number)
            script = [useful[int(rng.random() * len(useful))] for _ in range(self._task_set.max_turns)]
            first = await self._attempt("episode", make(), task, seed, script)
            second = await self._attempt("episode", make(), task, seed, script)
            self._expect(
                first == second,
                "deterministic",
                "the same episode for the same task, seed and actions",
                "a different episode",
            )
            # Abandon an episode, then reset: no state may carry over.
            await self._attempt("reset_again", reused, task, seed, script[:2])
            third = await self._attempt("reset_again", reused, task, seed, script)
            self._expect(
                first == third, "reset_again", "reset() to clear all state", "another episode than in a new one"
            )
            for bad in BAD_ACTIONS:
                await self._attempt("bad_action", make(), task, seed, [bad])
        try:
            await reused.close()
            await reused.close()
        except Exception as error:
            self._expect(False, "close", "close() to be idempotent", repr(error))

    async def _attempt(
        self, name: str, environment: Environment, task: Task, seed: int, script: Sequence[str]
    ) -> list[Any] | None:
        try:
            return await self._play(environment, task, seed, script)
        except Exception as error:
            self._expect(False, name, "no exception from reset() or step(), whatever the action", repr(error))
            return None

    async def _play(self, environment: Environment, task: Task, seed: int, script: Sequence[str]) -> list[Any]:
        """Play the script and check every step. Returns the prompt and the steps."""
        prompt = await environment.reset(task, seed)
        good = isinstance(prompt, tuple) and bool(prompt) and all(isinstance(m, Message) for m in prompt)
        self._expect(good, "prompt", "a non-empty tuple of Message from reset()", repr(prompt))
        results: list[Any] = [prompt]
        for action in script:
            step = await environment.step(action)
            results.append(step)
            self._check_step(step)
            if not isinstance(step, Step) or step.done:
                break
        return results

    def _check_step(self, step: Any) -> None:
        if not isinstance(step, Step):
            self._expect(False, "step", "a Step from step()", repr(step))
            return
        has_text = isinstance(step.observation, str) and bool(step.observation.strip())
        self._expect(has_text, "observation", "a non-empty text as the observation", repr(step.observation))
        self._expect(0 <= step.reward <= 1, "reward", "a reward in [0, 1]", step.reward)
        if step.success:
            self._expect(step.done and step.reward == 1, "success", "done and reward 1 with success", step)
        self._expect(_is_json(step.info), "info", "a JSON-serialisable info", repr(step.info))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(dict(value))
    except (TypeError, ValueError):
        return False
    return True
