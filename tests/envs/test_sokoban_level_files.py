"""Level files: the forms in which collections are published, errors with file and line, and the option `levels`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skillsd.envs import load
from skillsd.envs.checked import CheckedTaskSet
from skillsd.envs.conformance import assert_conforms
from skillsd.envs.sokoban import Sokoban
from skillsd.envs.sokoban.board import SYMBOLS, Level
from skillsd.envs.sokoban.environment import FILE_MAX_STEPS
from skillsd.envs.sokoban.game import Game, level_of
from skillsd.envs.sokoban.level_files import MAX_SIDE, read_levels
from skillsd.errors import UserError

ONE = ["#####", "#@$.#", "#####"]
TWO = ["  ####", "###  #", "# .$@#", "#    #", "######"]
BOTH = [Level.from_rows(rows).id for rows in (ONE, TWO)]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(text, name="levels.xsb")`: a level file."""

    def make(text: str | bytes, name: str = "levels.xsb") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def text(*levels: list[str]) -> str:
    return "\n\n".join("\n".join(rows) for rows in levels)


PLAIN = text(ONE, TWO)
FORMS = {
    "blank lines": PLAIN,
    "many blank lines, some with spaces": f"\n\n{text(ONE)}\n   \n\n\n{text(TWO)}\n\n",
    "numbered comments": f"; 1\n{text(ONE)}\n; 2\n{text(TWO)}",
    "numbered comments after the level": f"{text(ONE)}\n; 1\n\n{text(TWO)}\n; 2 'the end'\n",
    "names": f"My levels\nauthor: me\n\nLevel 1\n\n{text(ONE)}\nThe second, #2\n{text(TWO)}\n",
    "metadata": f"Title: All\n\n{text(ONE)}\nTitle: One\nAuthor: me # 1\nComment: 3x5\n\n{text(TWO)}\nTitle: Two\n",
    "rulers": f"----------\n{text(ONE)}\n==========\n{text(TWO)}\n----------\n",
    "names that are numbers": f"1\n{text(ONE)}\n2\n{text(TWO)}",
    "another floor": PLAIN.replace(" ", "-"),
    "and another": PLAIN.replace(" ", "_"),
    "blanks at the end of rows": PLAIN.replace("#\n", "#   \n"),
    "margins": "\n".join(f"   {line}" for line in PLAIN.split("\n")),
    "Windows": PLAIN.replace("\n", "\r\n"),
    "an old Macintosh": PLAIN.replace("\n", "\r"),
    "a byte order mark": "\ufeff" + PLAIN,
    "run-length encoded": "; 1\n5#|#@$.#|5#\n; 2\n2-4#|3#2-#|#-.$@#\n#4-#|6#",
    "floor out of reach": PLAIN.replace("#@$.#\n#####", "#@$.##\n#### #\n   ###"),
    "another starting place": PLAIN.replace("#  #", "#@ #").replace("$@#", "$ #"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_usual_forms(write: Write, form: str) -> None:
    assert [found.level.id for found in read_levels(write(FORMS[form]))] == BOTH


def test_comments_in_other_encodings(write: Write) -> None:
    path = write("; Björn\n".encode("latin-1") + PLAIN.encode())
    assert [found.level.id for found in read_levels(path)] == BOTH


def test_levels_are_cropped_and_know_their_line(write: Write) -> None:
    path = write(f"; one\n{text(ONE)}\n; two\n\n{text(TWO)}")
    one, two = read_levels(path)
    assert (one.place, two.place) == (f"{path}:2", f"{path}:7")
    assert two.level.rows() == ["######", "###  #", "# .$@#", "#    #", "######"]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("; 1\n####\n#@x.#\n####", 3, "'x' is not a symbol"),
        ("#####\n#@$.#\n#####\n\n####\n#@ #\n####", 5, "0 boxes"),
        ("#####\n#@$ #\n#####", 1, "1 boxes and 0 targets"),
        ("; 1\n\n######\n#@$.@#\n######", 3, "2 players"),
        ("; 1\n#####\n#@$. \n#####", 2, "open: the player can leave it in row 2, column 5"),
        ("; 1\n#####\n#@ *#\n#####", 2, "solved at the start"),
        ("#####\n#@$.#\n#####\n\n#####\n#$ .#\n#@  #\n#####", 5, "can't be solved"),
        (f"; 1\n#{'-' * MAX_SIDE}#", 2, "cells"),
        ("; 1\n" + "##\n" * (MAX_SIDE + 1), 2, "rows"),
        ("; 1\n999#999#", 2, "1998 cells"),
        ("; 1\n9999#", 2, "'9' is not a symbol"),
        ("; 1\n#####3", 2, "'3' is not a symbol"),
    ],
)
def test_errors_name_file_and_line(write: Write, content: str, line: int, message: str) -> None:
    path = write(content)
    with pytest.raises(UserError) as caught:
        read_levels(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)


def test_files_without_levels(write: Write, tmp_path: Path) -> None:
    for content in ("", "\n\n", "; nothing\nTitle: none\n"):
        with pytest.raises(UserError, match="no level"):
            read_levels(write(content))
    for path in (tmp_path, tmp_path / "none.xsb"):
        with pytest.raises(UserError, match="can't read the level file"):
            read_levels(path)


@given(st.text(st.sampled_from(f"{SYMBOLS}\n|;a12\u2028\0"), max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.xsb"
    path.write_text(content)
    try:
        levels = read_levels(path)
    except UserError:
        return
    assert all(found.level == found.level.cropped() for found in levels)


# -- the option -----------------------------------------------------------------------------------------------------


def test_a_file_is_the_split_test(write: Write) -> None:
    sokoban = load("sokoban", {"levels": str(write(PLAIN)), "preset": "paper"})
    assert isinstance(sokoban, CheckedTaskSet)
    sokoban = sokoban.inner
    assert isinstance(sokoban, Sokoban)
    assert sokoban.splits == ("test",)
    tasks = sokoban.tasks("test")
    assert [(task.id, task.split, task.difficulty) for task in tasks] == [(BOTH[0], "test", 1), (BOTH[1], "test", 2)]
    assert sokoban.max_turns == FILE_MAX_STEPS
    assert Sokoban(levels=write(PLAIN), max_steps=9).max_turns == 9
    game = Game(level_of(tasks[0]), sokoban.rules)
    assert game.step("<action>Right</action>").success
    assert sokoban.oracle(tasks[1]) == "push the box at r2c3 Left (to r2c2)"
    with pytest.raises(UserError, match=r"'train'.*Known: test"):
        sokoban.tasks("train")
    people = sokoban.for_people()
    assert (people.splits, people.rules.style) == (("test",), "grid")


def test_a_file_for_each_split(write: Write) -> None:
    train, test = write(text(ONE), "train.xsb"), write(text(TWO), "test.xsb")
    sokoban = Sokoban(levels={"train": str(train), "test": str(test)}, max_steps=20)
    assert sokoban.splits == ("train", "test")
    assert [task.id for split in sokoban.splits for task in sokoban.tasks(split)] == BOTH
    assert_conforms(sokoban)


def test_a_puzzle_in_two_splits_is_refused(write: Write) -> None:
    train, test = write(f"; 1\n{text(ONE)}", "train.xsb"), write(text(TWO, [row[::-1] for row in ONE]), "test.xsb")
    with pytest.raises(UserError) as caught:
        Sokoban(levels={"train": train, "test": test})
    assert f"{test}:7: " in str(caught.value)
    assert f"{train}:2 of 'train'" in str(caught.value)


def test_a_puzzle_that_occurs_again_gets_an_id_of_its_own(write: Write) -> None:
    """A collection is evaluated as it is published."""
    sokoban = Sokoban(levels=write(text(ONE, TWO, ONE, ONE[::-1])))
    ids = [task.id for task in sokoban.tasks("test")]
    assert ids == [*BOTH, f"{BOTH[0]}-2", f"{BOTH[0]}-3"]


def test_the_fingerprint_depends_on_the_levels_and_not_on_the_comments(write: Write) -> None:
    prints = [
        Sokoban(levels=write(content, name)).fingerprint("test")
        for content, name in (
            (PLAIN, "a.xsb"),
            (FORMS["metadata"], "b.xsb"),
            (FORMS["margins"], "c.xsb"),
            (text(ONE), "d.xsb"),
            (text(TWO, ONE), "e.xsb"),
        )
    ]
    assert len(set(prints[:3])) == 1
    assert len(set(prints)) == 3


@pytest.mark.parametrize("levels", [3, {}, {"train": 3}, {1: "a.xsb"}, ["a.xsb"], True])
def test_values_that_are_no_files(levels: object) -> None:
    with pytest.raises(UserError, match=r"levels is .*; expected a level file, or splits with their level files"):
        load("sokoban", {"levels": levels})


def test_demonstrations_leave_out_the_files_levels(write: Write) -> None:
    """They come from the preset's rooms, and may meet a level of the file by chance."""
    first = next(Sokoban().demonstrations("train", seed=7)).task
    path = write(first.payload["level"])
    sokoban = Sokoban(levels=path, max_steps=20)
    shown = {demonstration.task.id for demonstration in islice(sokoban.demonstrations("train", seed=7), 40)}
    assert first.id not in shown
    assert len(shown) == 5


def test_a_level_that_is_too_large_for_the_solver_has_no_oracle(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skillsd.envs.sokoban.environment.ORACLE_LIMIT", 3)
    rows = ["########", "#      #", "# $  . #", "#     @#", "########"]
    sokoban = Sokoban(levels=write(text(rows)))
    assert sokoban.oracle(sokoban.tasks("test")[0]) is None
