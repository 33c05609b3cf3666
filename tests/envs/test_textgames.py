"""What the text games share, on a small engine of our own: prompts, results, skills and demonstrations."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skillsd.envs.conformance import assert_conforms
from skillsd.envs.textgames import prompt, summarise
from skillsd.errors import UserError
from skillsd.types import Demonstration, Skill

sys.path.insert(0, str(Path(__file__).parent))
from fake_games import FakeGames


@pytest.fixture
def games() -> Iterator[FakeGames]:
    made = FakeGames()
    yield made
    made.pool().stop()


def info(command: str | None, **changes: Any) -> dict[str, Any]:
    base = {"before": 0.0, "score": 0.0, "refused": False, "places": ["a", "b"], "ended": False, "answer": "Done."}
    return {"command": command, **base, **changes}


@pytest.mark.parametrize("style", prompt.STYLES)
def test_conforms_to_the_environment_interface(style: str) -> None:
    games = FakeGames(style)
    try:
        assert_conforms(games, actions=["Action: go 1", "go_2", "take_key", "Action: give up"])
    finally:
        games.pool().stop()


def test_an_episode(games: FakeGames) -> None:
    task = games.tasks("train")[1]
    steps = games.played(task, ["dance", "go 1", "take key"])
    assert [(step.reward, step.success, step.done) for step in steps] == [
        (0.0, False, False),
        (0.5, False, False),
        (1.0, True, True),
    ]
    assert [step.info["refused"] for step in steps] == [True, False, False]
    [lost] = games.played(task, ["give up"])
    assert (lost.reward, lost.success, lost.done) == (0.0, False, True)  # the engine's score is -1


@pytest.mark.parametrize(
    ("reply", "command"),
    [
        ("Action: take key", "take key"),
        ("take key", "take key"),
        ("I see a key.\n**Action:** `take key`", "take key"),
        ("Action: look around\nThen:\naction:  take   key ", "take key"),
        ("I see a key.\nI take it.", None),
        ("Action:", None),
        ("Action: take the \N{SNOWMAN}", None),
        ("Action: " + "take key " * 40, None),
        ("", None),
    ],
)
def test_commands_are_read_from_replies(reply: str, command: str | None) -> None:
    found = prompt.command_of("react", reply)
    assert (None if isinstance(found, prompt.Refused) else found) == command


@pytest.mark.parametrize("style", prompt.STYLES)
@pytest.mark.parametrize("command", ["take key", "open frosted-glass door", "0"])
def test_written_commands_are_read_back(style: prompt.Style, command: str) -> None:
    assert prompt.command_of(style, prompt.written(style, command)) == command


def test_texts_of_the_style_words() -> None:
    [message] = prompt.first_prompt("words", "Find the key!", "you are in room 0", "", 6)
    assert message.content == "find the key ; you are in room 0"
    assert prompt.observation("words", "You are in the Side Yard.\n\tA box, empty.", 99) == (
        "you are in the side yard a box empty"
    )
    assert prompt.observation("words", "...", 99) == "empty"
    assert prompt.observation("react", "x" * 12, 10) == "x" * 10 + "\n[2 characters left out]"


def test_a_success_gives_the_way_that_was_found() -> None:
    walk = [
        info("look around", places=["hall", "hall"]),
        info("dance", refused=True, answer="Unknown action.", places=["hall", "hall"]),
        info("move east", places=["hall", "yard"]),
        info("look around", places=["yard", "yard"]),
        info("move west", places=["yard", "hall"]),  # back where it began
        info("move north", places=["hall", "attic"]),
        info(None, refused=True, answer=""),
        info("take coin", places=["attic", "attic and coin"], score=1.0, ended=True),
    ]
    skill = summarise.summarise_turns(walk, True, "react")
    assert skill == Skill(
        "Scored: take coin (+1.00). The task was done with 7 commands.",
        'Refused: dance ("Unknown action."). 1 answers had no command.',
        "look around; move north; take coin",
    )
    assert summarise.summarise_turns(walk, True, "words") == Skill("", "", "move_north take_coin")


def test_a_walk_in_which_something_was_done_stays() -> None:
    walk = [
        info("move east", places=["hall", "yard"]),
        info("open gate", places=["yard", "yard with a gate"]),
        info("move west", places=["yard with a gate", "hall"]),
        info("take coin", places=["hall", "won"], score=1.0, ended=True),
    ]
    skill = summarise.summarise_turns(walk, True, "words")
    assert skill is not None
    assert skill.golden_workflow == "move_east open_gate move_west take_coin"


def test_a_failure_gives_a_start_and_what_went_wrong() -> None:
    start = [info("read map"), info("take coin", score=0.5), info("eat coin", before=0.5, score=0.5)]
    skill = summarise.summarise_turns(start, False, "react")
    assert skill == Skill(
        "Scored: take coin (+0.50).",
        "The turns ran out at a score of 0.50.",
        "A start, the rest has to be found out: read map; take coin",
    )
    lost = [*start, info("focus on sink", before=0.5, score=-1.0, ended=True)]
    skill = summarise.summarise_turns(lost, False, "react")
    assert skill is not None
    assert skill.mistake_analysis == "The game was lost with: focus on sink."
    assert summarise.summarise_turns([], False, "react") is None


def test_demonstrations_follow_the_solution_or_play_at_random() -> None:
    games = FakeGames("words")
    try:
        mixed = list(itertools.islice(games.demonstrations("train", seed=1, careless_share=0.5), 40))

        async def in_an_event_loop() -> list[Demonstration]:  # as `skillsd sft` does
            return list(itertools.islice(games.demonstrations("train", seed=1, careless_share=0.5), 40))

        assert asyncio.run(in_an_event_loop()) == mixed
        for demonstration in mixed:
            gold = [prompt.written("words", command) for command in games.gold(demonstration.task)]
            played = [turn.action for turn in demonstration.turns]
            if demonstration.skill is not None:
                assert demonstration.skill.golden_workflow.split() == played == gold
        plain = [demonstration for demonstration in mixed if demonstration.skill is None]
        assert 10 < len(plain) < 30
        solved = [demonstration.turns[-1].observation == "you have the key" for demonstration in plain]
        assert any(solved)
        assert not all(solved)
        with pytest.raises(UserError, match="for the split 'train' only; got 'dev'"):
            games.demonstrations("dev", seed=0)
        with pytest.raises(UserError, match="careless"):
            games.demonstrations("train", seed=0, careles_share=1)
        with pytest.raises(UserError, match="a share from 0 to 1"):
            games.demonstrations("train", seed=0, careless_share=2)
    finally:
        games.pool().stop()


def test_invalid_options_are_rejected() -> None:
    with pytest.raises(UserError, match="prompt style of 'fake-games'"):
        FakeGames("reakt")
    with pytest.raises(UserError, match="max_turns is 0; expected a whole number, at least 1"):
        FakeGames(max_turns=0)
    with pytest.raises(UserError, match="hosts is 0"):
        FakeGames(hosts=0)
    with pytest.raises(UserError, match="call_seconds is -1"):
        FakeGames(call_seconds=-1)
