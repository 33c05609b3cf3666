"""Episodes: rules, observations and parsing of the agent's text."""

from __future__ import annotations

import asyncio
import hashlib
import itertools

import pytest

from skillsd.envs import load
from skillsd.envs.sokoban import Sokoban, language
from skillsd.envs.sokoban.board import MOVES, Level
from skillsd.envs.sokoban.game import Game, task_of
from skillsd.envs.sokoban.language import parse
from skillsd.envs.sokoban.levels import generate
from skillsd.envs.sokoban.presets import PRESETS, STYLES
from skillsd.errors import UserError
from skillsd.types import Outcome, Task, Trajectory, Turn

ROWS = ["######", "#@$ .#", "# #  #", "#    #", "#    #", "######"]
TWO = ["######", "#@$. #", "# #  #", "# $. #", "#    #", "######"]


def game(rows: list[str] = ROWS, **options: object) -> Game:
    return Game(Level.from_rows(rows), Sokoban(**options).rules)  # type: ignore[arg-type]


def test_terse_episode() -> None:
    episode = game()
    assert [m.content for m in episode.prompt()] == ["Sokoban: #r2c2 .r1c4 $r1c2 @r1c1"]
    step = episode.step("Right")
    assert step.observation == "$r1c3 @r1c2"
    assert step.info == {
        "moves": ["Right"],
        "board": "######\n# @$.#\n# #  #\n#    #\n#    #\n######",
        "boxes_moved": 1,
        "invalid": False,
        "deadlock": False,
    }
    assert episode.step("fly").observation == "Invalid $r1c3 @r1c2"
    step = episode.step("<action>right</action>")
    assert (step.observation, step.done, step.reward, step.success) == ("Solved", True, 1.0, True)
    assert episode.steps == 3


def test_the_picture_is_the_board() -> None:
    episode = game()
    steps = [episode.step(move) for move in ("Right", "Right")]
    turns = tuple(Turn("Right", step.observation, 0, 0, step.info) for step in steps)
    task = task_of(episode.level, "train", 2)
    trajectory = Trajectory(task, (), (), (), (), 0, turns, Outcome.SOLVED, 1.0, True, 0)
    start, one, two = (load("sokoban").picture(trajectory, turn) for turn in (None, 0, 1))
    assert start
    assert one
    assert two
    assert [start["rows"], one["rows"][1], two["rows"][1]] == [ROWS, "# @$.#", "#  @*#"]
    assert [start["caption"], two["caption"]] == ["0 of 1 boxes on targets", "1 of 1 boxes on targets"]
    assert start["kind"] == "grid"
    assert set("".join(start["rows"] + two["rows"])) <= start["legend"].keys()


def test_terse_marks_the_box_and_the_player_on_targets() -> None:
    episode = Game(Level.from_rows(["#####", "#+* #", "# $ #", "#   #", "#####"]), Sokoban().rules)
    assert episode.prompt()[0].content == "Sokoban: .r1c1 .r1c2 *r1c2 $r2c2 +r1c1"


def test_blocked_and_invalid_moves_count() -> None:
    episode = game(max_steps=3)
    assert not episode.step("Up").done
    assert not episode.step("").done
    step = episode.step("Up")
    assert (step.observation, step.done, step.success, step.reward) == ("Over", True, False, 0.0)
    assert episode.step("Down").info["moves"] == []  # no effect after the end


def test_partial_reward_and_deadlock() -> None:
    episode = game(TWO, preset="paper")
    step = episode.step("<action>Right</action>")
    assert (step.reward, step.success, step.done) == (0.5, False, False)
    assert "Boxes on targets: 1/2. Moves left: 39." in step.observation
    stuck = game(["#####", "#@  #", "# $ #", "#.  #", "#####"])
    for move in ("Right", "Down"):
        step = stuck.step(move)
    assert step.info["deadlock"] is False  # there is a target along the bottom wall
    corner = game(["#####", "#@$ #", "#.  #", "#   #", "#####"])
    assert corner.step("Right").info["deadlock"] is True


def test_prose_reports_what_went_wrong() -> None:
    episode = game(preset="ragen")
    step = episode.step("<answer>Up, Up || Right Right Down Left Left</answer>")
    assert step.success
    episode = game(preset="ragen", style="objects")
    assert "Inner walls: r2c2" in episode.prompt()[0].content
    assert "separated by commas" in episode.prompt()[0].content
    step = episode.step("Up, Down, Down, Down, Left, Left")
    assert "Only the first 5 of your 6 moves" in step.observation
    assert "Blocked, nothing moved: Up, Left." in step.observation
    assert "You: r4c1" in step.observation
    assert "not understood" in episode.step("dance").observation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Up", "Up"),
        (" uP ,left||RIGHT\ndown", "Up Left Right Down"),
        ("I go <action>up</action> no <Action>Left</ACTION> right", "Left"),
        ("<answer>Down", "Down"),
        ("<action>a<action>Up</action>", "Up"),
        ("", None),
        ("Up please", None),
        ("<action></action> Up", None),
        ("|", None),
        ("上", None),
    ],
)
def test_parsing(text: str, expected: str | None) -> None:
    moves = parse(text)
    assert (None if moves is None else " ".join(MOVES[move] for move in moves)) == expected


TEXTS = {"terse": "ca5a0c0a74422053", "objects": "520bf40a7e2c48da", "grid": "46afdb67b02e99a9"}


@pytest.mark.parametrize("style", STYLES)
def test_the_texts_a_model_reads_are_unchanged(style: str) -> None:
    """Results depend on the exact wording. A deliberate change makes them incomparable with earlier ones."""
    texts: list[str] = []
    for preset in PRESETS:
        sokoban = Sokoban(preset, style)
        for seed in range(5):  # not of the panels, which may be drawn anew
            level = generate(PRESETS[preset], seed)[0].level
            task = task_of(level, "train", 0)
            episode = Game(level, sokoban.rules)
            texts += [message.content for message in episode.prompt()]
            texts += [str(sokoban.oracle(task))]
            actions = itertools.cycle(
                ["Up", "Right, Down, Left, Left, Up, Up", "Down", "dance", "<action>Left</action>"]
            )
            while not episode.done:
                texts.append(episode.step(next(actions)).observation)
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == TEXTS[style]


def test_a_change_of_wording_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models answer differently to other words, so a stored evaluation must not be taken for a new one."""
    before = Sokoban().fingerprint("test")
    for text in ("Sokoban:", "Solved", "Over", "Invalid "):
        for name in ("observe", "prompt"):
            original = getattr(language, name)
            monkeypatch.setattr(language, name, lambda *given, f=original, t=text: f(*given).replace(t, t.upper()))
        assert Sokoban().fingerprint("test") != before, text
        monkeypatch.undo()
    assert Sokoban().fingerprint("test") == before


FINGERPRINTS = {
    "nano": {"train": "7f016cc83d2a3014", "tune": "a54f30018f3540d4", "test": "e563742fa6879515"},
    "nano-hard": {"train": "0335c2511ff0c5a4", "tune": "eb75012cdf49af98", "test": "04c482087911f8d0"},
    "paper": {
        "train": "476a8046a0b2c856",
        "tune": "b7a9f43f2bec5293",
        "test": "e5d3a5e36f8c6ef9",
        "test512": "1790992ea8fd7764",
    },
    "ragen": {"train": "fd9eb205e603fab7", "tune": "4997ed8b2ca5dc1d", "test": "5914e1ec651b4814"},
    "verl-agent": {"train": "06ed245c7be64b99", "tune": "f6f4fd089f651800", "test": "0ab7b0b206c1a900"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_fingerprints_are_unchanged(preset: str) -> None:
    """They decide which results are comparable.

    Last changed when ids began to ignore the player's place, shifts and margins, the panels were drawn anew without
    puzzles that are in another split, and the fingerprint began to cover the wording of the texts (issue 14).
    """
    sokoban = Sokoban(preset)
    assert {split: sokoban.fingerprint(split) for split in sokoban.splits} == FINGERPRINTS[preset]


def test_task_set() -> None:
    sokoban = load("sokoban", {"preset": "paper"})
    assert sokoban.splits == ("train", "tune", "test", "test512")
    assert sokoban.max_turns == 40
    assert [len(sokoban.tasks(split)) for split in sokoban.splits] == [96, 128, 64, 512]
    task = sokoban.tasks("train")[0]
    assert task.env == "sokoban"
    assert task.difficulty >= 6
    for nano_task in Sokoban().tasks("train")[::9]:
        episode = Game(Level.from_rows(nano_task.payload["level"].split("\n")), Sokoban().rules)
        oracle = Sokoban().oracle(nano_task)
        assert oracle is not None
        for move in oracle.split()[1::2]:
            step = episode.step(move)
        assert step.success
        assert episode.steps == nano_task.difficulty


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "papper"}, "Did you mean 'paper'"),
        ({"style": "gird"}, "Did you mean 'grid'"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_actions_per_turn": "two"}, "max_actions_per_turn"),
        ({"colour": 1}, "colour"),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("sokoban", options)


def test_a_task_without_a_level_is_an_error() -> None:
    with pytest.raises(UserError, match=r"payload\['level'\]"):
        asyncio.run(Sokoban().make().reset(Task("x", "sokoban", "train"), 0))
