"""Rules, ids, deadlock detection and the solver, compared with brute force."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skillsd.envs.sokoban.board import MOVES, Level, State, count_pushes, symmetries
from skillsd.envs.sokoban.solver import distance_table, solve
from skillsd.errors import UserError

CORRIDOR = Level.from_rows(["#####", "#@$.#", "#####"])


@st.composite
def levels(draw: st.DrawFn) -> Level:
    """Small rooms with up to 3 boxes, solvable or not, with or without a border."""
    height, width = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    cells = draw(st.permutations(range(height * width)))
    boxes = draw(st.integers(1, min(3, (height * width - 1) // 2)))
    text = ["#" if draw(st.integers(0, 4)) == 0 else " " for _ in range(height * width)]
    for cell in cells[:boxes]:
        text[cell] = "."
    places = draw(st.permutations(range(height * width)))
    for cell in places[:boxes]:
        text[cell] = "*" if text[cell] == "." else "$"
    text[places[boxes]] = "+" if text[places[boxes]] == "." else "@"
    return _balanced(text, width)


def _balanced(text: list[str], width: int) -> Level:
    # The code above never overwrites a target or a box, so their numbers are equal.
    return Level.from_rows(["".join(text[i : i + width]) for i in range(0, len(text), width)])


def brute_force(level: Level, start: State) -> int | None:
    """Length of the shortest solution by plain breadth-first search forwards."""
    queue, seen = deque([(start, 0)]), {start}
    while queue:
        state, moves = queue.popleft()
        if level.is_solved(state):
            return moves
        for move in range(4):
            after = level.play(state, move)
            if after is not None and after not in seen:
                seen.add(after)
                queue.append((after, moves + 1))
    return None


@settings(max_examples=120, deadline=None)
@given(levels())
def test_the_solvers_match_brute_force_and_deadlock_detection_is_sound(level: Level) -> None:
    shortest = brute_force(level, level.start)
    solution = solve(level)
    assert (None if solution is None else len(solution)) == shortest
    table = distance_table(level)
    assert table.moves.get(level.start) == shortest
    if solution is not None:
        assert table.pushes[level.start] <= count_pushes(level, level.start, solution)
    for state in table.moves:
        assert not level.is_dead(state)


@settings(max_examples=60, deadline=None)
@given(levels())
def test_symmetric_levels_have_the_same_id_and_difficulty(level: Level) -> None:
    table = distance_table(level)
    for rows in symmetries(level.rows()):
        other = Level.from_rows(rows)
        assert other.id == level.id
        there = distance_table(other)
        assert there.moves.get(other.start) == table.moves.get(level.start)
        assert there.pushes.get(other.start) == table.pushes.get(level.start)


@settings(max_examples=60, deadline=None)
@given(levels())
def test_ascii_round_trip(level: Level) -> None:
    assert Level.from_rows(level.rows()) == level


def test_pushes_and_blocked_moves() -> None:
    right = MOVES.index("Right")
    assert CORRIDOR.play(CORRIDOR.start, MOVES.index("Up")) is None
    after = CORRIDOR.play(CORRIDOR.start, right)
    assert after is not None
    assert CORRIDOR.is_solved(after)
    assert CORRIDOR.rows(after)[1] == "# @*#"
    assert CORRIDOR.play(after, right) is None


def test_two_boxes_against_a_wall_are_frozen() -> None:
    level = Level.from_rows(["######", "# $$ #", "#    #", "#@.. #", "######"])
    assert level.is_dead(level.start)  # no target along that wall
    open_floor = Level.from_rows(["######", "#    #", "# $$ #", "#@.. #", "######"])
    assert not open_floor.is_dead(open_floor.start)
    pair = Level.from_rows(["######", "#.$$.#", "#@   #", "######"])
    assert pair.is_dead(pair.start)  # both are stuck at the wall, although neither cell is a dead square


@pytest.mark.parametrize(
    ("rows", "message"),
    [(["#x@$."], "'x'"), (["@@$."], "2 players"), (["@$"], "1 boxes and 0 targets"), (["@"], "0 boxes")],
)
def test_invalid_levels_are_rejected(rows: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Level.from_rows(rows)
