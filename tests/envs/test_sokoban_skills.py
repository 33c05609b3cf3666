"""The summariser on hand-made episodes, and properties of the demonstrations."""

from __future__ import annotations

from itertools import islice

import pytest

from skillsd.envs.sokoban import Sokoban
from skillsd.envs.sokoban.board import MOVES, Level, State
from skillsd.envs.sokoban.game import Game
from skillsd.envs.sokoban.levels import panel_ids
from skillsd.envs.sokoban.solver import DistanceTable, distance_table
from skillsd.errors import UserError
from skillsd.types import Demonstration, Outcome, Skill, Task, Trajectory, Turn

ONE = ["######", "#    #", "#@$ .#", "#    #", "#    #", "######"]
TWO = ["######", "#@$. #", "#    #", "# $ .#", "#    #", "######"]


def trajectory(rows: list[str], actions: str, outcome: Outcome | None = None, **options: object) -> Trajectory:
    """The trajectory of playing the actions (separated by white space) on the level."""
    sokoban = Sokoban(**options)  # type: ignore[arg-type]
    game = Game(Level.from_rows(rows), sokoban.rules)
    turns, step = [], None
    for action in actions.split():
        step = game.step(action)
        turns.append(Turn(action, step.observation, 0, 0, step.info))
    assert step is not None
    ended = outcome or (Outcome.SOLVED if step.success else Outcome.TRUNCATED_TURNS)
    task = Task("t", "sokoban", "train", {"level": "\n".join(rows)})
    return Trajectory(task, (), (), (), (), 0, tuple(turns), ended, step.reward, step.success, 0)


def skill(rows: list[str], actions: str, **options: object) -> Skill | None:
    return Sokoban(**options).summariser()(trajectory(rows, actions, **options))  # type: ignore[arg-type]


def test_loops_are_removed_from_a_success() -> None:
    found = skill(ONE, "Down Up Right Left Left fly Right Right")
    # Neither the detour (Left and back), nor Left against the wall, nor `fly` appears in the plan.
    assert found == Skill("solved 2 moves 2 pushes", "", "@r2c1 Right @r2c2 Right")


def test_a_push_into_the_corner_is_named() -> None:
    found = skill(["######", "#+$  #", "#    #", "######"], "Down Up Right Right Right Left Left")
    assert found == Skill("", "never @r1c2 Right", "")
    found = skill(["######", "#  . #", "#@$  #", "#    #", "######"], "Right Right Left")
    assert found == Skill("", "never @r2c2 Right", "")  # there is no target along the right wall


def test_an_episode_with_nothing_to_report_gives_no_skill() -> None:
    assert skill(ONE, "Down Down Right") is None
    assert skill(ONE, "fly") is None


def test_only_repeated_loops_are_reported() -> None:
    assert skill(ONE, "Down Up") is None
    assert skill(ONE, "Down Up Down Up") == Skill("", "loop @r2c1 @r3c1", "")


def test_a_partial_success_gives_the_plan_to_its_best_state() -> None:
    found = skill(TWO, "<action>Right</action> <action>Down</action>", preset="paper", style="terse")
    assert found == Skill("", "", "@r1c1 Right")
    prose = skill(TWO, "Right Down", preset="paper")
    assert prose is not None
    assert prose.success_analysis == "1 of 2 boxes reached a target in 1 moves with 1 push; not solved."
    assert prose.golden_workflow == "Push the box at r1c2 Right (to r1c3)."


def test_prose_names_pushes_and_mistakes() -> None:
    found = skill(ONE, "Right Right", preset="ragen")
    assert found == Skill("Solved in 2 moves with 2 pushes.", "", "Push the box at r2c2 Right 2 times (to r2c4).")
    found = skill(["######", "#  . #", "#@$  #", "#    #", "######"], "Right Right nonsense", preset="ragen")
    assert found is not None
    assert found.mistake_analysis.startswith("Never push the box at r2c3 Right (standing at r2c2)")
    assert "legal moves only" in found.mistake_analysis


@pytest.fixture(scope="module")
def stream() -> list[Demonstration]:
    return list(islice(Sokoban().demonstrations("train", seed=7), 400))


def replay(demonstration: Demonstration) -> list[tuple[State, int, bool]]:
    """(state, move, learn) of every turn. Checks that the observations match the environment's."""
    game = Game(Level.from_rows(demonstration.task.payload["level"].split("\n")), Sokoban().rules)
    assert demonstration.prompt == game.prompt()
    visited = []
    for turn in demonstration.turns:
        assert not game.done
        visited.append((game.state, MOVES.index(turn.action), turn.learn))
        assert game.step(turn.action).observation == turn.observation
    assert game.done
    return visited


def table_of(demonstration: Demonstration) -> DistanceTable:
    return distance_table(Level.from_rows(demonstration.task.payload["level"].split("\n")))


def test_demonstrations_are_deterministic_and_exclude_all_panels(stream: list[Demonstration]) -> None:
    assert list(islice(Sokoban().demonstrations("train", seed=7), 40)) == stream[:40]
    assert list(islice(Sokoban().demonstrations("train", seed=8), 40)) != stream[:40]
    assert not {demonstration.task.id for demonstration in stream} & panel_ids()
    for demonstration in stream:
        replay(demonstration)
    with_skill = sum(demonstration.skill is not None for demonstration in stream)
    assert 150 < with_skill < 250


def test_the_experts_moves_are_optimal() -> None:
    for demonstration in islice(Sokoban().demonstrations("train", seed=1, skill_share=0.0, expert_share=1.0), 40):
        table = table_of(demonstration)
        for state, move, learn in replay(demonstration):
            assert learn
            assert move in table.best_moves(state)


def test_followers_play_the_plan_and_optimal_moves_off_it(stream: list[Demonstration]) -> None:
    seen = noisy = 0
    for demonstration in stream:
        if demonstration.skill is None or not demonstration.skill.golden_workflow:
            continue
        seen += 1
        words = demonstration.skill.golden_workflow.split()
        table = table_of(demonstration)
        state, plan = table.level.start, {}
        for cell, word in zip(words[::2], words[1::2], strict=True):
            assert cell == f"@{table.level.names[state[0]]}"
            plan[state] = MOVES.index(word)
            after = table.level.play(state, plan[state])
            assert after is not None
            state = after
        assert table.level.is_solved(state)
        for state, move, learn in replay(demonstration):
            noisy += not learn
            if learn:
                assert move == plan[state] if state in plan else move in table.best_moves(state)
    assert seen > 100
    assert noisy > 50


def test_play_avoids_the_mistake_its_skill_warns_about(stream: list[Demonstration]) -> None:
    warned = [d for d in stream if d.skill is not None and not d.skill.golden_workflow]
    assert warned
    for demonstration in warned:
        assert demonstration.skill is not None
        word, cell, move = demonstration.skill.mistake_analysis.split()[:3]
        assert word == "never"
        names = table_of(demonstration).level.names
        for state, made, _ in replay(demonstration):
            assert (f"@{names[state[0]]}", MOVES[made]) != (cell, move)


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        ("test", {}, "only"),
        ("train", {"nois": 0.1}, "Did you mean 'noise'"),
        ("train", {"noise": 2}, "noise is 2"),
        ("train", {"per_level": 0}, "per_level is 0"),
    ],
)
def test_invalid_demonstration_options_are_rejected(split: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sokoban().demonstrations(split, seed=0, **options)


@pytest.mark.parametrize(
    ("rows", "actions"),
    [
        (ONE, "Right Right"),
        (ONE, "Down Up Down Up"),
        (["######", "#+$  #", "#    #", "######"], "Down Up Right Right Right Left Left"),
        (TWO, "Right Down Down Left Right"),
    ],
)
def test_terse_skills_in_words_are_the_prose_styles_skills(rows: list[str], actions: str) -> None:
    terse, prose = skill(rows, actions), skill(rows, " ".join(actions.split()), style="objects", max_actions_per_turn=1)
    assert terse
    assert prose
    words = Sokoban().skill_for_people(trajectory(rows, actions).task, terse)
    assert words == prose
    assert "@" not in f"{words}"


def test_other_skills_stay_as_they_are_in_words() -> None:
    task = trajectory(ONE, "Right").task
    for written in (
        Skill("Push right twice.", "", "Right, then Right"),
        Skill("", "never @r9c9 Left", ""),
        Skill("", "loop x", ""),
    ):
        assert Sokoban().skill_for_people(task, written) == written
        assert Sokoban(style="objects").skill_for_people(task, written) == written
