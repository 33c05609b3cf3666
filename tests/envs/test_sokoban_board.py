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


@settings(max_examples=100, deadline=None)
@given(levels(), st.data())
def test_equal_puzzles_have_the_same_id(level: Level, data: st.DataObject) -> None:
    """Blank margins, a shift, floor out of reach, a symmetry and the player's place in its area make no difference."""
    margins = [data.draw(st.integers(0, 2), label=side) for side in ("above", "below", "left", "right")]
    fill = data.draw(st.sampled_from("# "), label="margin")
    area = sorted(level.reach(blocked=level.boxes))
    moved = level.at((data.draw(st.sampled_from(area), label="player"), level.boxes))
    turned = data.draw(st.sampled_from(list(symmetries(moved.rows()))), label="turned")
    assert Level.from_rows(with_margins(turned, *margins, fill)).id == level.id


def with_margins(rows: list[str], above: int, below: int, left: int, right: int, fill: str) -> list[str]:
    """The rows with a wall around them (in open floor they would be another puzzle), and then with margins."""
    width = len(rows[0]) + 2
    walled = ["#" * width, *(f"#{row}#" for row in rows), "#" * width]
    blank = fill * (width + left + right)
    return [blank] * above + [fill * left + row + fill * right for row in walled] + [blank] * below


@settings(max_examples=100, deadline=None)
@given(levels(), st.data())
def test_floor_out_of_reach_does_not_change_the_id(level: Level, data: st.DataObject) -> None:
    used = level.reach() | {*level.boxes, *level.targets}
    rows = [list(row) for row in level.rows()]
    for cell in set(range(level.height * level.width)) - used:
        row, column = divmod(cell, level.width)
        if all(ahead not in used for ahead in around(cell, level)):
            rows[row][column] = data.draw(st.sampled_from("# "), label=level.cell_name(cell))
    assert Level.from_rows(["".join(row) for row in rows]).id == level.id


def around(cell: int, level: Level) -> list[int]:
    """The cells next to a cell, walls included."""
    row, column = divmod(cell, level.width)
    steps = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return [r * level.width + c for r, c in steps if 0 <= r < level.height and 0 <= c < level.width]


@settings(max_examples=100, deadline=None)
@given(levels(), levels())
def test_different_puzzles_have_different_ids(one: Level, other: Level) -> None:
    """Equal ids mean equal rooms: some symmetry maps the reachable floor, the boxes, the targets and the area."""
    assert (one.id == other.id) == bool(placements(one) & placements(other))


def placements(level: Level) -> set[tuple[frozenset[tuple[int, int]], ...]]:
    """The floor, boxes, targets and the player's area as sets of coordinates, in each of the eight symmetries.

    Written without `Level.canonical_form`, on coordinates instead of text.
    """
    reached, area = level.reach(), level.reach(blocked=level.boxes)
    parts = [reached | {*level.boxes, *level.targets}, set(level.boxes), set(level.targets), area]
    points = [[divmod(cell, level.width) for cell in part] for part in parts]
    found = set()
    for mirrored in (False, True):
        for _ in range(4):
            points = [[(column, -row) for row, column in part] for part in points]
            shown = [[(row, -column) if mirrored else (row, column) for row, column in part] for part in points]
            top, left = min(row for row, _ in shown[0]), min(column for _, column in shown[0])
            found.add(tuple(frozenset((row - top, column - left) for row, column in part) for part in shown))
    return found


def test_what_makes_another_puzzle() -> None:
    room = ["#######", "#@ $ .#", "#     #", "#######"]
    others = {
        "a box": ["#######", "#@$  .#", "#     #", "#######"],
        "a target": ["#######", "#@ $. #", "#     #", "#######"],
        "a wall": ["#######", "#@ $ .#", "#    ##", "#######"],
        "floor": ["########", "#@ $ . #", "#     ##", "########"],
        "a box more": ["#######", "#@ $ .#", "# *   #", "#######"],
    }
    ids = {name: Level.from_rows(rows).id for name, rows in others.items()}
    assert len({*ids.values(), Level.from_rows(room).id}) == len(others) + 1


def test_the_player_in_another_area_is_another_puzzle() -> None:
    left, right = (Level.from_rows(["#######", row, "#######"]) for row in ("#@ $ .#", "#  $@.#"))
    assert left.id != right.id
    assert left.id == Level.from_rows(["#######", "# @$ .#", "#######"]).id
    assert right.id == Level.from_rows(["#######", "#  $ +#", "#######"]).id


@settings(max_examples=60, deadline=None)
@given(levels())
def test_cropping_keeps_the_puzzle(level: Level) -> None:
    cropped = level.cropped()
    assert cropped.cropped() == cropped
    assert cropped.id == level.id
    assert distance_table(cropped).moves.get(cropped.start) == distance_table(level).moves.get(level.start)
    assert set(cropped.rows()[0] + cropped.rows()[-1]) == {"#"}


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
