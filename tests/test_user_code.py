"""Faults of code that users bring: one line with its file and line, the traceback once, the rest counted."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from skillsd import plugins, user_code
from skillsd.envs import registry
from skillsd.errors import UserError
from skillsd.objective import find_estimator, find_term
from skillsd.skills.summarise import load_summariser
from skillsd.skills.ucb import picking_rule
from skillsd.user_code import FaultLog


def fails_in_here(text: str = "no luck") -> None:
    raise KeyError(text)


def caught(text: str = "no luck") -> BaseException:
    with pytest.raises(UserError) as error:
        plugins.construct("thing 'x'", "without arguments", fails_in_here, {"text": text})
    assert error.value.__cause__ is not None
    return error.value.__cause__


LINE = fails_in_here.__code__.co_firstlineno + 1


def test_where_is_the_users_file_and_line() -> None:
    place = user_code.where(caught())
    assert place.endswith(f"test_user_code.py:{LINE}")
    # A bug of this package, called by a user's script, is not the user's.
    with pytest.raises(UserError) as error:
        find_estimator("no such one")
    assert user_code.where(error.value) == ""


def test_libraries_are_not_the_users_unless_they_bring_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    with pytest.raises(UserError) as error:
        plugins.construct("thing", "", json.loads, {"s": "{"})
    assert error.value.__cause__ is not None
    assert user_code.where(error.value.__cause__) == ""
    monkeypatch.setattr(user_code, "_brought", {"json"})
    assert "json" in user_code.where(error.value.__cause__)


def test_one_line_whatever_the_exception_holds() -> None:
    class UglyError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    assert user_code.describe(UglyError()) == "UglyError: (its text can't be shown)"
    assert user_code.describe(ValueError()) == "ValueError"
    assert user_code.describe(ValueError("a\n  b\ud83d")) == "ValueError: a b\\ud83d"
    assert len(user_code.describe(ValueError("x" * 10**6))) < 400
    group = ExceptionGroup("several", [ExceptionGroup("inner", [KeyError("x")])])
    assert user_code.describe(group) == "KeyError: 'x'"


def test_first_of_each_kind_in_full_and_the_others_counted(tmp_path: Path) -> None:
    notes: list[str] = []
    faults = FaultLog(tmp_path / "errors.log", notes.append)
    for _ in range(3):
        faults.record("Env.step", caught())
    faults.record("Env.reset", caught("\ud83d"))
    faults.mention("Env.step: reward", "the reward is nan")
    faults.mention("Env.step: reward", "the reward is nan")
    faults.close()
    assert len(notes) == 3
    assert notes[0].startswith("Env.step raised KeyError: 'no luck' (")
    assert [str(tmp_path / "errors.log") in note for note in notes] == [True, False, False]
    text = (tmp_path / "errors.log").read_text()
    assert text.count("Traceback") == 2
    assert f"line {LINE}, in fails_in_here" in text
    assert "3 times: Env.step: KeyError" in text
    assert "2 times: Env.step: reward" in text


def test_a_log_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    notes: list[str] = []
    FaultLog(tmp_path / "nowhere" / "errors.log", notes.append).record("Env.step", caught())
    assert len(notes) == 1
    FaultLog(Path("/dev/full"), notes.append).record("Env.step", caught())
    assert len(notes) == 2


def test_faults_of_tasks_go_to_the_log_of_their_run() -> None:
    notes: dict[str, list[str]] = {"a": [], "b": []}

    async def run(name: str) -> None:
        with user_code.logged_in(FaultLog(None, notes[name].append)):
            await asyncio.gather(*(work(name) for _ in range(2)))

    async def work(name: str) -> None:
        await asyncio.sleep(0)
        user_code.mention(f"{name}.step", f"{name}.step gave nothing")

    async def main() -> None:
        await asyncio.gather(run("a"), run("b"))

    asyncio.run(main())
    assert [note.partition(" ")[0] for note in notes["a"] + notes["b"]] == ["a.step", "b.step"]


# -- constructors and imports ---------------------------------------------------------------------------------------

BROKEN = """
import sys
import skillsd.envs.base

class Raises:
    def __init__(self):
        raise LookupError("not today")

    async def summarise(self, trajectory): ...

class Exits(Raises):
    def __init__(self):
        sys.exit("bye")

class RaisingSet(skillsd.envs.base.TaskSet):
    name, splits, max_turns = "x", ("train",), 1
    tasks = make = None

    def __init__(self, how="raise"):
        if how == "exit":
            sys.exit(3)
        {}[how]

class Abstract(skillsd.envs.base.TaskSet):
    name = "x"

class Nameless(RaisingSet):
    del_ = None

    def __init__(self):
        self.name = None

class Game(skillsd.envs.base.Environment):
    async def reset(self, task, seed): ...
    async def step(self, action): ...

def gives_a_game():
    return Game()

def gives_nothing():
    pass

seven = 7
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_code.py").write_text(BROKEN)
    for name, text in {
        "key": "{}['x']",
        "exits": "import sys; sys.exit(1)",
        "syntax": "def (",
        "tabs": "if 1:\npass",
    }.items():
        (tmp_path / f"broken_{name}.py").write_text(f"\n\n{text}\n")
    yield
    for module in [name for name in sys.modules if name.startswith("broken_")]:
        del sys.modules[module]


LOADERS: list[Any] = [
    lambda name: registry.load(name),
    lambda name: load_summariser(name, {}),
    lambda name: picking_rule(name),
    lambda name: find_term("t", name, 1.0, "action_mask"),
    lambda name: find_estimator(name),
]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("broken_key", "KeyError: 'x' (broken_key.py:3)"),
        ("broken_exits", "SystemExit: 1 (broken_exits.py:3)"),
        ("broken_syntax", "broken_syntax.py:3)"),
        ("broken_tabs", "broken_tabs.py:4)"),
    ],
)
def test_a_module_that_fails_while_it_is_imported(
    broken: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any, module: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load(f"{module}:Thing")
    assert "can't be imported: " in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", LOADERS[1:])
@pytest.mark.parametrize(("name", "expected"), [("Raises", "LookupError: not today"), ("Exits", "SystemExit: bye")])
def test_a_constructor_that_raises_anything(broken: None, load: Any, name: str, expected: str) -> None:
    with pytest.raises(UserError, match=rf"{expected} \(.*broken_code\.py:\d+\)"):
        load(f"broken_code:{name}")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("broken_code:RaisingSet", {}, "can't be constructed with environment.options {}: KeyError: 'raise' ("),
        ("broken_code:RaisingSet", {"how": "exit"}, "SystemExit: 3 ("),
        ("broken_code:RaisingSet", {"how": []}, "TypeError: unhashable"),
        ("broken_code:Abstract", {}, "abstract class Abstract"),
        ("broken_code:Nameless", {}, "name is None, expected text that is not empty"),
        (
            "broken_code:Game",
            {},
            "It runs an episode: give the task set that makes it",
        ),
        ("broken_code:gives_a_game", {}, "a Game: expected a subclass"),
        ("broken_code:gives_nothing", {}, "a NoneType: expected a subclass"),
        ("broken_code:seven", {}, "a int: expected a subclass"),
        ("broken_code:sys", {}, "a module: expected a subclass"),
        ("json:JSONDecoder", {}, "the class JSONDecoder: expected a subclass"),
        ("json:loads", {}, "can't be constructed"),
        ("builtins:dict", {}, "the class dict: expected"),
        ("builtins:print", {}, "a NoneType: expected"),
    ],
)
def test_a_name_that_stands_for_no_task_set(broken: None, name: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        registry.load(name, options)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
