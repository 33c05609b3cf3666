"""Episodes: rules, observations and parsing of the agent's text."""

from __future__ import annotations

import asyncio
import hashlib
import itertools

import pytest

from skillsd.envs import load
from skillsd.envs.sokoban import Sokoban
from skillsd.envs.sokoban.board import MOVES, Level
from skillsd.envs.sokoban.game import Game, level_of
from skillsd.envs.sokoban.language import parse
from skillsd.envs.sokoban.presets import PRESETS, STYLES
from skillsd.errors import UserError
from skillsd.types import Task

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


TEXTS = {"terse": "ed1397077a4fc1bd", "objects": "f4424dfd70506e97", "grid": "e51c4574014bbb51"}


@pytest.mark.parametrize("style", STYLES)
def test_the_texts_a_model_reads_are_unchanged(style: str) -> None:
    """Results depend on the exact wording. A deliberate change makes them incomparable with earlier ones."""
    texts: list[str] = []
    for preset in PRESETS:
        sokoban = Sokoban(preset, style)
        for task in sokoban.tasks("train")[:5]:
            episode = Game(level_of(task), sokoban.rules)
            texts += [message.content for message in episode.prompt()]
            texts += [str(sokoban.oracle(task))]
            actions = itertools.cycle(
                ["Up", "Right, Down, Left, Left, Up, Up", "Down", "dance", "<action>Left</action>"]
            )
            while not episode.done:
                texts.append(episode.step(next(actions)).observation)
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == TEXTS[style]


FINGERPRINTS = {
    "nano-hard": {"test": "ffdfc576d922c679", "train": "7772724a8ea9020d", "tune": "edfb2644ead91ef4"},
    "nano": {"test": "cce209421008f7eb", "train": "34197f57ff1ecfb0", "tune": "02aaef0319d079ce"},
    "paper": {
        "test": "8686eefb9cdb01d8",
        "test512": "77c1550659e21b7d",
        "train": "7a02fc5f2c44a9c7",
        "tune": "c0f7ef853bbdb04c",
    },
    "ragen": {"test": "25121a6e881f37ab", "train": "9190495bd52199af", "tune": "0de0c27476878766"},
    "verl-agent": {"test": "7b335881e76d7ccd", "train": "d371558db69b268c", "tune": "5a38da100d8e99da"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_fingerprints_are_unchanged(preset: str) -> None:
    """They decide which results are comparable."""
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
