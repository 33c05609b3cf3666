"""TextWorld-Express and ScienceWorld: their task sets, and (slow) their real engines."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from skillsd.envs import hosts
from skillsd.envs.base import Environment
from skillsd.envs.conformance import assert_conforms
from skillsd.envs.scienceworld import ScienceWorld
from skillsd.envs.scienceworld.variations import TASKS, folds
from skillsd.envs.textgames.environment import TextGames
from skillsd.envs.textworld_express import TextWorldExpress, listing
from skillsd.envs.textworld_express.environment import GAMES
from skillsd.errors import UserError
from skillsd.types import Task

# --- without the engines ---


class FakeSurvey:
    """An engine with seeds 0 to 99 in train, 100 to 199 in dev, and so on; `texts` gives a game's texts by its seed."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        self.texts, self.requests = texts, 0

    def __call__(self, op: str, seconds: float, expected: Any, /, **arguments: Any) -> dict[str, Any]:
        self.requests += 1
        if op == "seeds":
            start = 100 * ["train", "dev", "test"].index(arguments["fold"])
            return {"seeds": list(range(start, start + 100))}
        rows = [
            {"seed": seed, "prompt": "same", "texts": self.texts.get(seed, str(seed)), "gold": ["go"] * (seed % 7 + 1)}
            for seed in arguments["seeds"]
        ]
        return {"games": rows}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path))
    return tmp_path


COUNTS = {"train": 5, "dev": 3, "test": 3}


def test_a_game_is_in_one_split_only(cache: Path) -> None:
    """Seed 101 is word for word the game of seed 2, seed 102 that of 100, and 200 that of 0."""
    ask = FakeSurvey({101: "2", 102: "100", 200: "0"})
    listed = listing.listed(ask, "1", "coin", "", COUNTS, 50)
    assert {split: [entry.seed for entry in games] for split, games in listed.items()} == {
        "train": [0, 1, 2, 3, 4],
        "dev": [100, 103, 104],
        "test": [201, 202, 203],
    }


def test_games_that_take_too_long_are_left_out(cache: Path) -> None:
    listed = listing.listed(FakeSurvey({}), "1", "coin", "", COUNTS, 3)
    assert [entry.seed for entry in listed["train"]] == [0, 1, 2, 7, 8]
    with pytest.raises(UserError, match="no games of at most 0 turns in 'train'"):
        listing.listed(FakeSurvey({}), "1", "coin", "", COUNTS, 0)


def test_fewer_games_if_there_are_no_more(cache: Path) -> None:
    ask = FakeSurvey({seed: str(seed % 2) for seed in range(100)})
    assert [entry.seed for entry in listing.listed(ask, "1", "coin", "", COUNTS, 50)["train"]] == [0, 1]


@pytest.mark.parametrize("damage", ["", "[]", '{"train": [{"seed": 1}]}'])
def test_the_listing_is_kept_and_made_again_if_damaged(cache: Path, damage: str) -> None:
    first = FakeSurvey({})
    made = listing.listed(first, "1", "coin", "", COUNTS, 50)
    again = FakeSurvey({})
    assert listing.listed(again, "1", "coin", "", COUNTS, 50) == made
    assert again.requests == 0
    [file] = (cache / "textworld-express-games").glob("*.json")
    file.write_text(damage)
    assert listing.listed(again, "1", "coin", "", COUNTS, 50) == made
    assert again.requests == first.requests


def test_another_engine_or_another_rule_is_another_listing(cache: Path) -> None:
    for version, params, turns in (("1", "", 50), ("2", "", 50), ("1", "numLocations=5", 50), ("1", "", 49)):
        ask = FakeSurvey({})
        listing.listed(ask, version, "coin", params, COUNTS, turns)
        assert ask.requests


def test_scienceworld_has_the_published_numbers_of_variations() -> None:
    made = ScienceWorld()
    assert [len(made.tasks(split)) for split in made.splits] == [3592, 1796, 1819]
    ids = [task.id for split in made.splits for task in made.tasks(split)]
    assert len(set(ids)) == len(ids)
    few = ScienceWorld(task_names=["boil", "grow-fruit"], variations=2, simplifications="easy")
    assert [task.id for task in few.tasks("dev")] == [
        "boil-15-easy",
        "boil-19-easy",
        "grow-fruit-69-easy",
        "grow-fruit-85-easy",
    ]


def test_invalid_options_are_rejected() -> None:
    with pytest.raises(UserError, match="game of TextWorld-Express"):
        TextWorldExpress(games=["coins"])
    with pytest.raises(UserError, match="game of TextWorld-Express"):
        TextWorldExpress(params={"coins": ""})
    with pytest.raises(UserError, match="textworld-express option test is 0"):
        TextWorldExpress(test=0)
    with pytest.raises(UserError, match="task of ScienceWorld"):
        ScienceWorld(task_names="boiling")
    with pytest.raises(UserError, match="simplification of ScienceWorld"):
        ScienceWorld(simplifications=["simple"])
    with pytest.raises(UserError, match="scienceworld option variations is 0"):
        ScienceWorld(variations=0)


@pytest.mark.parametrize("kind", [TextWorldExpress, ScienceWorld])
def test_without_the_engine_the_message_has_the_command(kind: type[TextGames], cache: Path) -> None:
    made = kind()  # type: ignore[call-arg]
    with pytest.raises(UserError, match=f"is not installed in .*: run `skillsd envs setup {made.name}`"):
        made.check_machine()


# --- the real engines ---


@pytest.fixture(scope="module")
def express() -> Iterator[TextWorldExpress]:
    yield from _set_up(TextWorldExpress(train=2, dev=2, test=2, hosts=1, call_seconds=200))


@pytest.fixture(scope="module")
def science() -> Iterator[ScienceWorld]:
    names = ("lifespan-longest-lived", "find-animal", "power-component", "test-conductivity")
    yield from _set_up(ScienceWorld(task_names=names, variations=2, max_turns=30, hosts=1, call_seconds=400))


def _set_up(made: Any) -> Iterator[Any]:
    try:
        made.check_machine()
    except UserError as error:
        pytest.skip(str(error))
    yield made
    made.pool().stop()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_textworld_express_conforms(express: TextWorldExpress) -> None:
    actions = ("Action: look around", "take coin", "Action: move north", "Action: open fridge", "Action: inventory")
    assert_conforms(express, episodes=4, actions=actions)
    assert {express.scenario(task) for task in express.tasks("train")} == set(GAMES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_scienceworld_conforms(science: ScienceWorld) -> None:
    actions = ("Action: look around", "open door to kitchen", "Action: go to kitchen", "focus on air", "Action: task")
    assert_conforms(science, episodes=2, actions=actions)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", ["express", "science"])
def test_the_engines_solutions_succeed(world: str, request: pytest.FixtureRequest) -> None:
    games: TextGames = request.getfixturevalue(world)
    for task in games.tasks("dev"):
        steps = games.played(task, games.gold(task))
        assert (steps[-1].success, steps[-1].reward) == (True, 1.0), task
        rewards = [step.reward for step in steps]
        assert rewards == sorted(rewards)
    for demonstration in itertools.islice(games.demonstrations("train", seed=0, skill_share=1), 3):
        assert demonstration.skill is not None
        assert demonstration.skill.golden_workflow


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_scienceworlds_folds_are_the_engines(science: ScienceWorld) -> None:
    host = science.pool().any()
    for name in TASKS:
        found = host.ask("folds", 400, {"train": list, "dev": list, "test": list}, task=name)
        assert found == {fold: list(variations) for fold, variations in folds(name).items()}, name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_games_of_one_virtual_machine_don_t_disturb_each_other(science: ScienceWorld) -> None:
    """ScienceWorld has one counter of ids for all games of a machine, and lists objects in the order of random hashes:
    the same episode had other texts after another one, until both were fixed (host/science.py)."""
    tasks = science.tasks("train")
    scripts = {task.id: list(science.gold(task)) for task in tasks}

    async def episodes(at_once: bool) -> dict[str, list[Any]]:
        environments = {task.id: science.make() for task in tasks}
        texts: dict[str, list[Any]] = {task.id: [] for task in tasks}

        async def opened(task: Task) -> None:
            texts[task.id].append(await environments[task.id].reset(task, 0))

        async def stepped(task: Task, environment: Environment, command: str) -> None:
            texts[task.id].append((await environment.step(command)).observation)

        if at_once:
            for task in tasks:
                await opened(task)
            for turn in itertools.zip_longest(*scripts.values()):
                for task, command in zip(tasks, turn, strict=True):
                    if command:
                        await stepped(task, environments[task.id], command)
        else:
            for task in reversed(tasks):
                await opened(task)
                for command in scripts[task.id]:
                    await stepped(task, environments[task.id], command)
        for environment in environments.values():
            await environment.close()
        return texts

    apart = asyncio.run(episodes(False))
    assert asyncio.run(episodes(True)) == apart
    science.pool().stop()  # and in another machine
    assert asyncio.run(episodes(True)) == apart


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_engine_is_replaced(express: TextWorldExpress) -> None:
    task = express.tasks("train")[0]

    async def use() -> None:
        environment = express.make()
        await environment.reset(task, 0)
        host = express.pool().any()
        host.kill(host.pid)
        with pytest.raises(hosts.HostBrokenError):
            await environment.step("look around")
        await environment.reset(task, 0)
        assert (await environment.step("look around")).observation

    asyncio.run(use())
