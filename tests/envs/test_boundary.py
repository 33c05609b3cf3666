"""Whatever an environment hands in is converted or refused, in a run and by the conformance kit alike."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skillsd.envs import values
from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.envs.checked import CheckedEnvironment, CheckedTaskSet, EnvironmentFaultError, checked
from skillsd.envs.conformance import check
from skillsd.envs.play import play
from skillsd.errors import UserError, unknown_name
from skillsd.rollouts.episode import run_episode
from skillsd.rollouts.policy import Budget, EpisodeState
from skillsd.types import Demonstration, DemonstrationTurn, Message, Outcome, Skill, Task, Trajectory

PROMPT = (Message("user", "Say up three times."),)


class Counting(Environment):
    """Count to three; `prompt` and `change` replace what it hands in."""

    prompt: Any = PROMPT

    async def reset(self, task: Task, seed: int) -> Any:
        self.count = 0
        return self.prompt

    async def step(self, action: str) -> Any:
        self.count += action == "up"
        won = self.count == 3
        return self.change(Step(f"{self.count} of 3", won, self.count / 3, won, {"count": self.count}))

    def change(self, step: Step) -> Any:
        return step


class Three(TaskSet):
    name = "three"
    splits: Any = ("train", "test")
    max_turns: Any = 5
    shortcuts = {"u": "up"}  # noqa: RUF012
    environment: type[Environment] = Counting

    def tasks(self, split: str) -> Any:
        if split not in self.splits:
            raise unknown_name("split", split, self.splits)
        return [Task(f"{split}-{i}", self.name, split) for i in range(3)]

    def make(self) -> Any:
        return self.environment()


class AlwaysUp:
    """A policy without a model."""

    temperature = 0.0

    class State(EpisodeState):
        async def act(self, turn: int) -> str | None:
            return "up"

        def observe(self, observation: str) -> None:
            observation.encode()

    def begin(self, prompt: Any, budget: Budget, **options: Any) -> EpisodeState:
        assert all(isinstance(message, Message) for message in prompt)
        return self.State()


def episode(task_set: TaskSet) -> Trajectory:
    task = Task("train-0", "three", "train")
    return asyncio.run(
        run_episode(AlwaysUp(), task_set.make(), task, Budget(5, 1, 99), seed=1, environment_seed=1, session="s")
    )


def with_step(**changes: Any) -> TaskSet:
    def change(self: Any, step: Step) -> Step:
        return dataclasses.replace(step, **{name: new(step) for name, new in changes.items()})

    return type("Changed", (Three,), {"environment": type("Changed", (Counting,), {"change": change})})()


def with_prompt(prompt: Any) -> TaskSet:
    return type("Changed", (Three,), {"environment": type("Changed", (Counting,), {"prompt": prompt})})()


def with_tasks(change: Callable[[Task], Any]) -> TaskSet:
    return type("Changed", (Three,), {"tasks": lambda self, split: [change(t) for t in Three.tasks(self, split)]})()


def with_method(name: str, result: Any) -> TaskSet:
    return type("Changed", (Three,), {name: lambda self, *args, **options: result})()


def with_attribute(name: str, value: Any) -> TaskSet:
    return type("Changed", (Three,), {name: value})()


# -- converted ------------------------------------------------------------------------------------------------------

CONVERTED: list[TaskSet] = [
    *[with_step(reward=lambda s, kind=kind: kind(s.reward)) for kind in (np.float32, np.float64, torch.tensor)],
    with_step(reward=lambda s: np.array(s.reward)),
    with_step(reward=lambda s: torch.tensor(s.reward, requires_grad=True)),
    with_step(reward=lambda s: torch.tensor(s.reward).bfloat16()),
    with_step(reward=lambda s: s.success),
    with_step(reward=lambda s: int(s.success)),
    with_step(done=lambda s: np.bool_(s.done), success=lambda s: torch.tensor(s.success)),
    with_step(done=lambda s: int(s.done), success=lambda s: np.int64(s.success)),
    with_step(info=lambda s: {"n": np.int64(3), "x": {"y": [np.float32(0.5), torch.tensor(True)], np.int64(1): None}}),
    with_step(observation=lambda s: np.str_(s.observation)),
    with_prompt(list(PROMPT)),
    with_prompt((Message("system", "Rules."), Message("user", np.str_("Say up.")))),
    with_tasks(lambda t: dataclasses.replace(t, difficulty=np.float32(2.5))),
    with_tasks(lambda t: dataclasses.replace(t, difficulty=torch.tensor(2), payload={"n": np.int64(3)})),
    with_tasks(lambda t: dataclasses.replace(t, id=np.str_(t.id))),
    with_attribute("max_turns", np.int64(5)),
    with_attribute("splits", ["train", "test"]),
]


@pytest.mark.parametrize("task_set", CONVERTED)
def test_numbers_and_booleans_of_numpy_and_torch_become_pythons(task_set: TaskSet) -> None:
    assert check(task_set) == []
    trajectory = episode(task_set)
    assert trajectory.outcome is Outcome.SOLVED, trajectory.error
    assert type(trajectory.reward) is float
    assert type(trajectory.success) is bool
    values.json_object(trajectory.turns[-1].info, "info")
    sure = checked(task_set)
    tasks = [task for split in sure.splits for task in sure.tasks(split)]
    assert {type(task.id) for task in tasks} == {str}
    assert {type(task.difficulty) for task in tasks} == {float}
    assert type(sure.max_turns) is int
    assert sure.fingerprint("train") == sure.fingerprint("train")


def test_what_fits_already_is_left_as_it_is() -> None:
    task_set = checked(with_tasks(lambda t: dataclasses.replace(t, payload={"place": (1, 2)})))
    [first, *_] = task_set.tasks("train")
    assert first.payload == {"place": (1, 2)}
    assert task_set.fingerprint("train") == task_set.inner.fingerprint("train")
    assert checked(task_set) is task_set
    assert task_set.shortcuts == {"u": "up"}  # further attributes
    assert isinstance(copy.copy(task_set), CheckedTaskSet)


# -- refused: an episode --------------------------------------------------------------------------------------------

REFUSED_STEPS: list[tuple[str, TaskSet]] = [
    *[
        ("reward", with_step(reward=lambda s, r=r: r))
        for r in (2.0, -0.1, float("nan"), None, "1", 1j, np.float32("inf"))
    ],
    *[("reward", with_step(reward=lambda s, r=r: r)) for r in (np.array([0.5]), torch.zeros(2), 10**400)],
    *[("done", with_step(done=lambda s, d=d: d)) for d in ("no", None, 2, 0.5, np.array([True]))],
    *[("success", with_step(success=lambda s, d=d: d)) for d in ("", None, "yes", [])],
    ("success", with_step(success=lambda s: True)),
    ("success", with_step(reward=lambda s: s.reward * 0.9)),
    *[("observation", with_step(observation=lambda s, o=o: o)) for o in (None, b"up", 3, "\ud83d", ["up"])],
    *[("info", with_step(info=lambda s, i=i: i)) for i in (None, [], "text", {"x": {1}}, {"x": float("nan")})],
    *[("info", with_step(info=lambda s, i=i: i)) for i in ({"x": np.zeros(2)}, {(1, 2): 3}, {"x": b"bytes"})],
    ("info", with_step(info=lambda s: {"x": 10**5000})),
]

REFUSED_PROMPTS: list[Any] = [
    "Say up three times.",
    None,
    (),
    [],
    Message("user", "alone"),
    ({"role": "user", "content": "a dict"},),
    ("text",),
    (Message("user", "\ud83d half a surrogate pair"),),
    (Message("user", None),),  # type: ignore[arg-type]
    (Message("user", ["parts"]),),  # type: ignore[arg-type]
    (Message("human", "x"),),  # type: ignore[arg-type]
    (Message(None, "x"),),  # type: ignore[arg-type]
    (Message("system", "no user"),),
    iter(PROMPT),
]


class Ugly:
    def __repr__(self) -> str:
        raise RuntimeError("no text for this one")


@pytest.mark.parametrize(
    ("name", "task_set"),
    [
        *REFUSED_STEPS,
        *[("prompt", with_prompt(p)) for p in REFUSED_PROMPTS],
        ("reward", with_step(reward=lambda s: Ugly())),
    ],
)
def test_an_invalid_value_costs_the_episode_and_is_found_by_the_kit(name: str, task_set: TaskSet) -> None:
    trajectory = episode(task_set)
    assert trajectory.outcome is Outcome.ENV_ERROR
    assert trajectory.error.startswith(("reset: ", "step "))
    assert "expected" in trajectory.error
    assert "test_boundary.py:" in trajectory.error  # where the method is defined
    assert trajectory.error.isascii()
    assert len(trajectory.error) < 400
    assert name in {problem.check for problem in check(task_set)}
    with pytest.raises(EnvironmentFaultError):
        play(task_set, "train", 0, input=lambda prompt: "u", print=lambda text: None)


@pytest.mark.parametrize("method", ["reset", "step"])
def test_a_method_that_is_not_async(method: str) -> None:
    plain = {"reset": lambda self, task, seed: PROMPT, "step": lambda self, action: Step("x", False, 0.0, False)}
    task_set = with_attribute("environment", type("Plain", (Counting,), {method: plain[method]}))
    assert "expected an awaitable (`async def" in episode(task_set).error
    assert check(task_set)


def test_a_make_that_makes_nothing() -> None:
    task_set = with_method("make", None)
    with pytest.raises(EnvironmentFaultError, match="the result of make\\(\\) is None, expected an Environment"):
        checked(task_set).make()
    assert "make" in {problem.check for problem in check(task_set)}


# -- refused: a task set --------------------------------------------------------------------------------------------

REFUSED_SETS: list[tuple[str, str, TaskSet]] = [
    *[
        ("tasks", "task_id", with_tasks(lambda t, i=i: dataclasses.replace(t, id=i)))
        for i in (7, None, "", b"x", "\ud83d")
    ],
    *[
        ("tasks", "difficulty", with_tasks(lambda t, d=d: dataclasses.replace(t, difficulty=d)))
        for d in (None, float("nan"), "hard", np.float32("nan"), float("inf"))
    ],
    *[
        ("tasks", "payload", with_tasks(lambda t, p=p: dataclasses.replace(t, payload=p)))
        for p in (None, [1], {"x": {1}}, {"x": np.zeros(2)}, "text")
    ],
    ("tasks", "unique_ids", with_tasks(lambda t: dataclasses.replace(t, id="the same"))),
    ("tasks", "task_split", with_tasks(lambda t: dataclasses.replace(t, split="tune"))),
    ("tasks", "task_env", with_tasks(lambda t: dataclasses.replace(t, env=None))),
    ("tasks", "tasks", with_tasks(lambda t: t.id)),
    *[("splits", "splits", with_attribute("splits", value)) for value in ("train", (), ("train", "train"), (1,), None)],
    *[("max_turns", "max_turns", with_attribute("max_turns", value)) for value in (0, None, "5", 2.5, True)],
    *[("slowest_call", "slowest_call", with_attribute("slowest_call", value)) for value in (-1, None, float("nan"))],
    ("rules_in_words", "rules_in_words", with_method("rules_in_words", {"x": {1}})),
    ("summariser", "summariser", with_method("summariser", "rules")),
]

TASK = Task("train-0", "three", "train")
OF_A_TASK: list[tuple[str, Any]] = [
    *[("secrets", value) for value in ("abc", None, 3, [1], ["\ud83d"])],
    *[("oracle", value) for value in (3, b"up", ["up"])],
    *[("scenario", value) for value in (3, b"up")],
    *[("golden_skill", value) for value in ("up", {"golden_workflow": "up"}, Skill("", "", None))],  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("attribute", "name", "task_set"), REFUSED_SETS)
def test_an_invalid_task_set_is_a_user_error(attribute: str, name: str, task_set: TaskSet) -> None:
    sure = checked(task_set)

    def read() -> None:
        found = getattr(sure, attribute)
        found("train") if attribute == "tasks" else found() if callable(found) else None

    with pytest.raises(UserError) as error:
        read()
    assert str(error.value).startswith(f"the environment 'three', Changed.{attribute}: ")
    assert "expected" in str(error.value)
    assert name in {problem.check for problem in check(task_set)}


@pytest.mark.parametrize(("name", "value"), OF_A_TASK)
def test_an_invalid_value_for_a_task_is_a_user_error(name: str, value: Any) -> None:
    task_set = with_method(name, value)
    with pytest.raises(UserError, match=rf"Changed\.{name}: .*expected"):
        getattr(checked(task_set), name)(TASK)
    assert name in {problem.check for problem in check(task_set)}


GRID = {"kind": "grid", "rows": ["#@ #"]}


@pytest.mark.parametrize(
    "value",
    [
        "#@ #",
        {"rows": ["#"]},
        {"kind": "film"},
        {"kind": ["grid"]},
        {"kind": "grid"},
        {"kind": "grid", "rows": "#@ #"},
        {"kind": "grid", "rows": [3]},
        {**GRID, "legend": ["wall"]},
        {**GRID, "legend": {"#": 3}},
        {**GRID, "caption": 3},
        {**GRID, "colour": "red"},
        {"kind": "code", "input": "print(1)"},
        {"kind": "code", "input": "print(1)", "output": "1", "error": ValueError()},
        {"kind": "text", "text": "\ud83d"},
    ],
)
def test_an_invalid_picture_is_a_user_error(value: Any) -> None:
    task_set = with_method("picture", value)
    with pytest.raises(UserError, match=r"Changed\.picture: .*expected"):
        checked(task_set).picture(episode(Three()), None)
    assert "picture" in {problem.check for problem in check(task_set)}


@pytest.mark.parametrize(
    "value",
    [
        None,
        GRID,
        {**GRID, "legend": {"#": "wall"}, "caption": None},
        {"kind": "code", "input": "", "output": "1", "error": None},
        {"kind": "text", "text": "a\nb", "caption": "c"},
    ],
)
def test_a_picture_is_handed_on(value: Any) -> None:
    assert checked(with_method("picture", value)).picture(episode(Three()), None) == value


def demonstrating(*given: Any) -> TaskSet:
    return with_method("demonstrations", iter(given))


GOOD = Demonstration(TASK, PROMPT, (DemonstrationTurn("up", "1 of 3"),), Skill("", "", "up"))


@pytest.mark.parametrize(
    "bad",
    [
        "up",
        dataclasses.replace(GOOD, prompt="Say up"),  # type: ignore[arg-type]
        dataclasses.replace(GOOD, turns=()),
        dataclasses.replace(GOOD, turns=(DemonstrationTurn("\ud83d", "x"),)),
        dataclasses.replace(GOOD, turns=(DemonstrationTurn("up", None),)),  # type: ignore[arg-type]
        dataclasses.replace(GOOD, turns=(DemonstrationTurn("up", "x", learn="no"),)),  # type: ignore[arg-type]
        dataclasses.replace(GOOD, turns=("up",)),  # type: ignore[arg-type]
        dataclasses.replace(GOOD, skill="up"),  # type: ignore[arg-type]
    ],
)
def test_an_invalid_demonstration_is_a_user_error(bad: Any) -> None:
    stream = checked(demonstrating(GOOD, bad)).demonstrations("train", seed=0)
    assert next(stream) == GOOD
    with pytest.raises(UserError, match=r"Changed\.demonstrations: .*expected"):
        next(stream)
    assert "demonstrations" in {problem.check for problem in check(demonstrating(bad))}


def test_demonstrations_that_end_or_fail() -> None:
    with pytest.raises(UserError, match="the stream ended, expected an infinite one"):
        list(checked(demonstrating(GOOD)).demonstrations("train", seed=0))
    with pytest.raises(UserError, match="has no demonstrations"):
        checked(Three()).demonstrations("train", seed=0)

    def fails(self: Any, split: str, *, seed: int) -> Iterator[Demonstration]:
        yield GOOD
        raise KeyError("file")

    stream = checked(with_attribute("demonstrations", fails)).demonstrations("train", seed=0)
    assert next(stream) == GOOD
    with pytest.raises(UserError, match=r"KeyError: 'file' \(.*test_boundary\.py:\d+\)"):
        next(stream)


# -- any value ------------------------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    | st.sampled_from([np.float32(0.5), np.bool_(True), np.zeros(2), torch.tensor(1.0), {1}, object(), "\ud83d"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(("observation", "done", "reward", "success", "info"), ANYTHING)))
def test_any_step_is_accepted_or_refused(fields: dict[str, Any]) -> None:
    try:
        step = values.step(Step(**fields))
    except values.InvalidError:
        return
    assert type(step.done) is bool
    assert 0 <= step.reward <= 1


@settings(max_examples=200, deadline=None)
@given(ANYTHING, st.lists(st.tuples(ANYTHING, ANYTHING), max_size=3))
def test_any_prompt_is_accepted_or_refused(value: Any, roles: list[tuple[Any, Any]]) -> None:
    for prompt in (value, [Message(role, content) for role, content in roles]):
        with pytest.raises(values.InvalidError):
            values.messages(prompt)


@settings(max_examples=200, deadline=None)
@given(ANYTHING, ANYTHING, ANYTHING)
def test_any_task_is_accepted_or_refused(id_: Any, payload: Any, difficulty: Any) -> None:
    try:
        [task] = values.tasks([Task(id_, "three", "train", payload, difficulty)], "train")
    except values.InvalidError:
        return
    assert task.id


def test_file_is_where_the_environment_is_defined() -> None:
    assert Path(__file__).name in episode(with_prompt("text")).error


@pytest.mark.parametrize(("base", "wrapper"), [(TaskSet, CheckedTaskSet), (Environment, CheckedEnvironment)])
def test_every_method_is_handed_on(base: type, wrapper: type) -> None:
    """A method of the base class that the wrapper lacks would silently be the default instead of the user's."""
    public = {name for name in vars(base) if not name.startswith("_")}
    assert public <= vars(wrapper).keys()


def test_what_no_episode_could_survive_ends_the_run() -> None:
    class Elsewhere(Three):
        def make(self) -> Environment:
            raise UserError("needs another machine")

        def check_machine(self) -> None:
            raise UserError("needs another machine")

    task_set = checked(Elsewhere())
    for call in (task_set.make, task_set.check_machine):
        with pytest.raises(UserError, match="needs another machine") as raised:
            call()
        assert not isinstance(raised.value, EnvironmentFaultError)
