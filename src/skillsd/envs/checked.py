"""The boundary to environments: wrappers that check what an environment hands in, and say where it went wrong.

Every `Environment` and `TaskSet` goes through here once, whatever uses it. A fault in an episode is an
`EnvironmentFaultError`, which costs that episode; a fault that concerns the whole task set is a `UserError`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from skillsd import user_code
from skillsd.envs import values
from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.errors import UserError
from skillsd.types import Demonstration, Message, Skill, Task, Tool, Trajectory

T = TypeVar("T")


class EnvironmentFaultError(UserError):
    """An environment raised, or returned something invalid.

    Args:
        call: the call, in words.
        reason: what went wrong, with the environment's file and line.
    """

    def __init__(self, call: str, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{call}: {reason}")


class CheckedEnvironment(Environment):
    """An environment whose results are checked.

    `reset`, `step` and `close` raise `EnvironmentFaultError` for whatever the environment raises (but for a
    cancellation) and for an invalid result.
    """

    def __init__(self, inner: Environment) -> None:
        self.inner = inner

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        return await self._call("reset", values.messages, task, seed)

    async def step(self, action: str) -> Step:
        return await self._call("step", values.step, action)

    async def close(self) -> None:
        await self._call("close", lambda nothing: None)

    async def _call(self, method: str, check: Callable[[object], T], *args: Any) -> T:
        function = getattr(self.inner, method)
        try:
            result = function(*args)
            if not inspect.isawaitable(result):
                expected = f"an awaitable (`async def {method}`)"
                raise values.InvalidError(method, expected, result, f"the result of {method}()")
            return check(await result)
        except (KeyboardInterrupt, GeneratorExit, asyncio.CancelledError):
            raise
        except BaseException as error:  # SystemExit too: it would end the whole process
            raise EnvironmentFaultError(method, _reason(self.inner, method, function, error)) from error


class CheckedTaskSet(TaskSet):
    """A task set whose values are checked. Further attributes are those of the task set it wraps (`inner`).

    Every method raises `UserError` for whatever the task set raises and for an invalid value.
    """

    def __init__(self, inner: TaskSet) -> None:
        self.inner = inner
        self._tasks: dict[str, list[Task]] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # while it is being copied, there is no `inner` yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def splits(self) -> tuple[str, ...]:
        return self._get("splits", values.splits)

    @property
    def max_turns(self) -> int:
        return self._get("max_turns", lambda value: values.count(value, "max_turns"))

    @property
    def slowest_call(self) -> float:
        return self._get("slowest_call", lambda value: values.number(value, "slowest_call", low=0))

    @property
    def tools(self) -> Sequence[Tool]:
        return self._get("tools", values.tools)

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self._tasks:
            self._tasks[split] = self._call("tasks", lambda value: values.tasks(value, split), split)
        return list(self._tasks[split])

    def make(self) -> CheckedEnvironment:
        method = self.inner.make
        try:
            made = method()
            if not isinstance(made, Environment):
                raise values.InvalidError("make", "an Environment", made, "the result of make()")
        except UserError:  # of this machine or these options: every episode would fail alike
            raise
        except (Exception, SystemExit) as error:
            raise EnvironmentFaultError("make", _reason(self.inner, "make", method, error)) from error
        return checked_environment(made)

    def check_machine(self) -> None:
        self._call("check_machine", lambda value: None)

    def fingerprint(self, split: str) -> str:
        if type(self.inner).fingerprint is TaskSet.fingerprint:
            return super().fingerprint(split)  # of the checked values
        return self._call("fingerprint", lambda value: values.text(value, "fingerprint"), split)

    def rules_in_words(self) -> Mapping[str, Any]:
        return self._call("rules_in_words", lambda value: values.json_object(value, "rules_in_words"))

    def for_people(self) -> TaskSet:
        return checked(self._call("for_people", _task_set))

    def picture(self, trajectory: Trajectory, turn: int | None) -> Mapping[str, Any] | None:
        return self._call("picture", values.picture, trajectory, turn)

    def summariser(self) -> Callable[[Trajectory], Skill | None] | None:
        return self._call("summariser", lambda value: values.optional_function(value, "summariser"))

    def oracle(self, task: Task) -> str | None:
        return self._of(task, "oracle", values.optional_text)

    def golden_skill(self, task: Task) -> Skill | None:
        if type(self.inner).golden_skill is TaskSet.golden_skill:
            return super().golden_skill(task)
        return self._of(task, "golden_skill", values.skill)

    def skill_for_people(self, task: Task, skill: Skill) -> Skill:
        def check(value: object) -> Skill:
            return values.skill(value, "skill_for_people", f"skill_for_people of task {task.id!r}") or skill

        return self._call("skill_for_people", check, task, skill)

    def wrong_skill(self, task: Task) -> Skill | None:
        return self._of(task, "wrong_skill", values.skill)

    def practice(self, *, seed: int) -> tuple[Task, Skill]:
        return self._call("practice", values.practice, seed=seed)

    def scenario(self, task: Task) -> str | None:
        return self._of(task, "scenario", values.optional_text)

    def secrets(self, task: Task) -> Sequence[str]:
        return self._of(task, "secrets", values.texts)

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        stream = self._call("demonstrations", _iterator, split, seed=seed, **options)

        def checked_stream() -> Iterator[Demonstration]:
            while True:
                yield self._guarded(
                    "demonstrations", self.inner.demonstrations, lambda: values.demonstration(next(stream))
                )

        return checked_stream()

    def _get(self, name: str, check: Callable[[object], T]) -> T:
        definition = getattr(type(self.inner), name, None)
        return self._guarded(name, getattr(definition, "fget", None), lambda: check(getattr(self.inner, name)))

    def _call(self, name: str, check: Callable[[object], T], *args: Any, **options: Any) -> T:
        method = getattr(self.inner, name)
        return self._guarded(name, method, lambda: check(method(*args, **options)))

    def _of(self, task: Task, name: str, check: Callable[[object, str, str], T]) -> T:
        return self._call(name, lambda value: check(value, name, f"{name} of task {task.id!r}"), task)

    def _guarded(self, name: str, function: Any, work: Callable[[], T]) -> T:
        try:
            return work()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            reason = _reason(self.inner, name, function, error)
            raise UserError(f"the environment {self.name!r}, {type(self.inner).__name__}.{name}: {reason}") from error


def checked(task_set: TaskSet) -> CheckedTaskSet:
    """`task_set` with its values checked; the same one if they are checked already."""
    return task_set if isinstance(task_set, CheckedTaskSet) else CheckedTaskSet(_task_set(task_set))


def checked_environment(environment: Environment) -> CheckedEnvironment:
    """`environment` with its results checked; the same one if they are checked already."""
    return environment if isinstance(environment, CheckedEnvironment) else CheckedEnvironment(environment)


def _task_set(value: object) -> TaskSet:
    if not isinstance(value, TaskSet):
        raise UserError(f"expected a task set (a subclass of skillsd.envs.base.TaskSet), got {value!r:.80}")
    return value


def _iterator(value: object) -> Iterator[Any]:
    if not hasattr(value, "__next__"):
        raise values.InvalidError("demonstrations", "an iterator", value, "the result of demonstrations()")
    iterator: Iterator[Any] = value  # type: ignore[assignment]
    return iterator


def _reason(owner: object, method: str, function: object, error: BaseException) -> str:
    """What went wrong in a call, which is also recorded in the run's log."""
    call = f"{type(owner).__name__}.{method}"
    if isinstance(error, values.InvalidError):
        place = user_code.defined(function)
        reason = f"{error}{f' ({place})' if place else ''}"
        user_code.mention(f"{call}: {error.check}", f"{call}: {reason}")
        return reason
    if isinstance(error, StopIteration):
        return "the stream ended, expected an infinite one"
    user_code.record(call, error)
    return user_code.describe(error)
