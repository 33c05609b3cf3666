"""Set-ups and the list of environments: found by name or entry point, run with the options they take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from skillsd import plugins
from skillsd.envs import listing, setups
from skillsd.errors import UserError

THEIRS = """
from skillsd.envs.setups import Setup
from skillsd.errors import UserError

marks = []

def run(say, *, python=None):
    marks.append(python)
    say(f"installed with {python}")

def broken():
    raise RuntimeError("no luck")

SETUP = Setup("a game (1 minute)", lambda: bool(marks), run)
BROKEN = Setup("nothing", broken, run)
NONE = 3

def game():
    raise UserError("the game needs\\na console")
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module with set-ups, and the registered names for them."""
    (tmp_path / "their_setups.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"game": "SETUP", "broken": "BROKEN", "none": "NONE"}
    found = {name: f"their_setups:{attribute}" for name, attribute in names.items()}
    environments = {"sokoban": plugins.SHIPPED[plugins.ENVIRONMENTS]["sokoban"], "game": "their_setups:game"}
    groups = {plugins.SETUPS: found, plugins.ENVIRONMENTS: environments}
    monkeypatch.setattr(plugins, "registered", lambda group: groups[group])
    yield
    sys.modules.pop("their_setups", None)


def test_a_set_up_runs_with_the_options_that_are_given(theirs: None) -> None:
    lines: list[str] = []
    setups.run("game", lines.append, {"python": "python3.12", "data": None})
    assert lines == ["installed with python3.12"]
    with pytest.raises(UserError, match=r"^the set-up 'game' takes no --data$"):
        setups.run("game", lines.append, {"python": None, "data": Path("x")})
    assert len(lines) == 1


def test_unknown_set_ups_are_one_line(theirs: None) -> None:
    with pytest.raises(UserError, match="Did you mean 'game'"):
        setups.find("gme")
    with pytest.raises(UserError, match="'sokoban' needs no set-up"):
        setups.find("sokoban")
    with pytest.raises(UserError, match=r"set-up 'none' \(their_setups:NONE\) is a int: expected a Setup"):
        setups.find("none")


def test_the_list_says_what_is_ready_and_how_to_set_up_the_rest(theirs: None) -> None:
    sokoban, game, broken, none = (line.split(maxsplit=1)[1] for line in listing.lines())
    assert sokoban.startswith("ready       train ")
    assert game == "not set up  skillsd envs setup game: a game (1 minute)"
    assert broken == "not ready   cannot be loaded: no luck"
    assert none.startswith("not ready   cannot be loaded: set-up 'none'")
    setups.run("game", lambda line: None, {})
    assert listing.lines()[1].split(maxsplit=1)[1] == "not ready   the game needs a console"
