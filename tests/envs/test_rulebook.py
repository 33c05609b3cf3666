"""The rulebook: hidden rules, what an episode shows of them, and skills that say them."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from skillsd.envs.conformance import assert_conforms
from skillsd.envs.registry import load
from skillsd.envs.rulebook.environment import Rulebook, splits_of
from skillsd.envs.rulebook.game import world_rules
from skillsd.envs.rulebook.language import COLOURS, SIGNS, WORDINGS
from skillsd.errors import UserError
from skillsd.types import Outcome, Skill, Task, Trajectory, Turn

OPTIONS: list[dict[str, Any]] = [
    {},
    {"words": "english"},
    {"reward": "completion", "failures": "mute", "world": 3, "length": 3, "train": 7},
]


def play(task_set: Rulebook, task: Task, actions: list[str]) -> Trajectory:
    """An episode with these actions."""

    async def episode() -> list[Any]:
        environment = task_set.make()
        await environment.reset(task, 0)
        return [await environment.step(action) for action in actions]

    steps = asyncio.run(episode())
    turns = tuple(Turn(a, s.observation, 0, 0, s.info) for a, s in zip(actions, steps, strict=True))
    last = steps[-1]
    outcome = Outcome.SOLVED if last.success else Outcome.FAILED
    return Trajectory(task, (), (), (), (), 0, turns, outcome, last.reward, last.success, 0)


def right_answers(task_set: Rulebook, task: Task) -> list[str]:
    return [task_set.rules[sign] for sign in task.payload["signs"]]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_conforms(options: dict[str, Any]) -> None:
    assert_conforms(load("rulebook", options), actions=list(COLOURS))


@pytest.mark.parametrize("length", [3, 4, 6])
def test_no_two_tasks_have_the_same_signs(length: int) -> None:
    held_out = splits_of(length, 1)
    everything = [frozenset(signs) for tasks in splits_of(length, 8000).values() for signs in tasks]
    assert len(everything) == len(set(everything))
    assert all(len(signs) == length for signs in everything)
    for split in ("tune", "test"):  # whatever the number of training tasks
        assert splits_of(length, 48)[split] == held_out[split]


def test_worlds_differ_and_stay_as_they_are() -> None:
    worlds = [world_rules(world) for world in range(30)]
    assert len({tuple(rules.items()) for rules in worlds}) == 30
    assert all(tuple(rules) == SIGNS and set(rules.values()) <= set(COLOURS) for rules in worlds)
    assert list(world_rules(0).values())[:6] == FIRST
    prints = {Rulebook(world=world).fingerprint("test") for world in range(5)}
    assert len(prints) == 5


FIRST = ["red", "white", "green", "black", "gold", "red"]


@pytest.mark.parametrize("words", WORDINGS)
@pytest.mark.parametrize("failures", ["telling", "mute"])
@pytest.mark.parametrize("reward", ["success", "completion"])
def test_rewards_and_what_a_failure_tells(words: str, failures: str, reward: str) -> None:
    task_set = Rulebook(words=words, failures=failures, reward=reward)
    task = task_set.tasks("train")[0]
    answers = right_answers(task_set, task)
    won = play(task_set, task, answers)
    assert (won.success, won.reward) == (True, 1.0)
    other = next(colour for colour in COLOURS if colour != answers[1])
    lost = play(task_set, task, [answers[0], other, *answers[2:]])
    assert (lost.success, lost.reward) == (False, 0.75 if reward == "completion" else 0.0)
    assert (answers[1] in lost.turns[1].observation.replace(".", "").split()) is (failures == "telling")
    assert lost.turns[1].info["colour"] == (answers[1] if failures == "telling" else None)
    assert task.payload["signs"][2] in lost.turns[1].observation


def test_actions_of_a_language_model() -> None:
    answer = WORDINGS["english"].answer
    assert [answer(text) for text in ("Gold.", " the answer is RED!", "red, no: blue", "", "redder")] == [
        "gold", "red", None, None, None,
    ]  # fmt: skip
    assert WORDINGS["terse"].answer(" red ") == "red"
    assert WORDINGS["terse"].answer("red blue") is None


# -- skills -----------------------------------------------------------------------------------------------------------


def test_a_skill_says_what_the_episode_showed() -> None:
    task_set = Rulebook()
    task = task_set.tasks("train")[0]
    signs, answers = task.payload["signs"], right_answers(task_set, task)
    write = task_set.summariser()
    rules = " ".join(f"{sign} {answer}" for sign, answer in zip(signs, answers, strict=True))
    assert write(play(task_set, task, answers)) == Skill("all 4 answers were right", "", rules)
    assert write(play(task_set, task, ["nonsense"] * 4)) == Skill("", "", rules)  # failures tell

    mute = Rulebook(failures="mute")
    wrong = next(colour for colour in COLOURS if colour != answers[0])
    one = mute.summariser()(play(mute, task, [wrong, *answers[1:3], "nonsense"]))
    assert one == Skill("", f"{signs[0]} {wrong}", f"{signs[1]} {answers[1]} {signs[2]} {answers[2]}")
    assert mute.summariser()(play(mute, task, ["nonsense"] * 4)) is None


def test_people_read_sentences() -> None:
    task_set = Rulebook()
    task = task_set.tasks("train")[0]
    shown = task_set.skill_for_people(task, Skill("", "bell red", "drum gold key blue"))
    assert shown == Skill("", "The bell is not red.", "The drum is gold. The key is blue.")
    assert task_set.skill_for_people(task, Skill("", "bell red", "")).golden_workflow == ""
    english = Rulebook(words="english")
    assert english.skill_for_people(task, shown) == shown


def test_the_oracle_solves_its_task_and_the_wrong_skill_is_of_another_world() -> None:
    task_set = Rulebook(world=2)
    differing = 0
    for task in task_set.tasks("train"):
        pairs = task_set.oracle(task).split()
        assert play(task_set, task, pairs[1::2]).success
        wrong = task_set.wrong_skill(task).golden_workflow.split()
        assert wrong[::2] == pairs[::2] == list(task.payload["signs"])
        differing += sum(a != b for a, b in zip(wrong[1::2], pairs[1::2], strict=True))
    assert differing / (4 * 48) > 0.6  # 5 in 6 on average


def test_a_practice_task_has_rules_of_its_own_which_its_skill_says() -> None:
    task_set = Rulebook()
    held_out = {frozenset(t.payload["signs"]) for split in ("tune", "test") for t in task_set.tasks(split)}
    ids, told = set(), set()
    for seed in range(50):
        task, skill = task_set.practice(seed=seed)
        words = skill.golden_workflow.split()
        rules = dict(zip(words[::2], words[1::2], strict=True))
        assert play(task_set, task, [rules[sign] for sign in task.payload["signs"]]).success
        assert task.split == "train"
        assert set(rules) == set(task.payload["signs"])
        assert frozenset(task.payload["signs"]) not in held_out
        ids.add(task.id), told.add(skill)
    assert len(ids) == len(told) == 50
    environment_world = play(task_set, task_set.tasks("train")[0], right_answers(task_set, task_set.tasks("train")[0]))
    assert environment_world.success  # the world's own rules hold again


# -- demonstrations ---------------------------------------------------------------------------------------------------


def test_demonstrations_follow_what_their_skill_says_and_guess_the_rest() -> None:
    task_set = Rulebook()
    held_out = {frozenset(t.payload["signs"]) for split in ("tune", "test") for t in task_set.tasks(split)}
    right: dict[str, list[bool]] = {"known": [], "guessed": []}
    kinds = {"none": 0, "rules": 0, "mistakes": 0}
    for demonstration in itertools.islice(task_set.demonstrations("train", seed=0, mistake_share=0.5), 800):
        skill = demonstration.skill
        words = (skill.golden_workflow if skill else "").split()
        told = dict(zip(words[::2], words[1::2], strict=True))
        words = (skill.mistake_analysis if skill else "").split()
        excluded = dict(zip(words[::2], words[1::2], strict=True))
        kinds["rules" if told else "mistakes" if excluded else "none"] += 1
        assert frozenset(demonstration.task.payload["signs"]) not in held_out
        for sign, turn in zip(demonstration.task.payload["signs"], demonstration.turns, strict=True):
            assert turn.action == told.get(sign, turn.action) != excluded.get(sign)
            right["known" if sign in told else "guessed"].append(turn.observation.startswith("Yes"))
    assert all(right["known"])
    assert 0.1 < sum(right["guessed"]) / len(right["guessed"]) < 0.25
    assert min(kinds.values()) > 50


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"reward": "sucess"}, "'sucess'.*Did you mean 'success'"),
        ({"words": "klingon"}, "'klingon'"),
        ({"failures": True}, "'True'"),
        ({"world": -1}, "world is -1; expected a whole number, at least 0"),
        ({"world": "2"}, "world is '2'"),
        ({"length": 7}, "length is 7; expected a whole number from 3 to 6"),
        ({"length": 3, "train": 400}, "train is 400; with length 3 there are 368 tasks"),
        ({"train": True}, "train is True"),
        ({"wrold": 1}, "'wrold'.*Did you mean 'world'"),
    ],
)
def test_a_mistyped_option_is_one_line(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        load("rulebook", options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"mistak_share": 0.1}, "mistake_share"), ({"length": 0}, "from 1 to 16"), ({"skill_share": 2}, "from 0 to 1")],
)
def test_mistyped_demonstration_options(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Rulebook().demonstrations("train", seed=0, **options)
    with pytest.raises(UserError, match="only; got 'test'"):
        Rulebook().demonstrations("test", seed=0)
