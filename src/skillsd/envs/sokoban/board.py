"""The rules of Sokoban: levels (immutable), states, moves, and detection of deadlocks.

Cells are ints, ``row * width + column``, 0-based, border included. A state is ``(player, boxes)`` with sorted boxes, so
equal positions are equal tuples. A move is an index into `MOVES`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from skillsd.errors import UserError

MOVES = ("Up", "Down", "Left", "Right")
OPPOSITE = (1, 0, 3, 2)
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))

State = tuple[int, tuple[int, ...]]

SYMBOLS = "#.$*@+ -_"
"""The symbols of an ASCII level (XSB); see `Level.from_rows`."""


@dataclass(frozen=True)
class Level:
    """A level: the room and the initial positions.

    Attributes:
        height, width: size of the room in cells, border included.
        walls, targets, boxes: sorted cells. The numbers of boxes and targets are equal and at least 1.
        player: the player's cell.
    """

    height: int
    width: int
    walls: tuple[int, ...]
    targets: tuple[int, ...]
    boxes: tuple[int, ...]
    player: int

    @classmethod
    def from_rows(cls, rows: Sequence[str]) -> Level:
        """Parse standard ASCII (XSB) rows: ``#`` wall, ``.`` target, ``$`` box, ``*`` box on target, ``@`` player,
        ``+`` player on target; space, ``-`` or ``_`` is floor. Short rows are padded with floor.

        Raises:
            UserError: for an unknown symbol, a number of players other than 1, or if the numbers of boxes and targets
                differ or are 0.
        """
        height, width = len(rows), max((len(row) for row in rows), default=0)
        cells: dict[str, list[int]] = {symbol: [] for symbol in SYMBOLS}
        for row, text in enumerate(rows):
            for column, symbol in enumerate(text):
                if symbol not in cells:
                    raise UserError(f"level row {row} has {symbol!r}; expected one of {SYMBOLS!r}: {text!r}")
                cells[symbol].append(row * width + column)
        players = cells["@"] + cells["+"]
        boxes = tuple(sorted(cells["$"] + cells["*"]))
        targets = tuple(sorted(cells["."] + cells["*"] + cells["+"]))
        if len(players) != 1:
            raise UserError(f"level has {len(players)} players (@ or +); expected exactly 1")
        if not boxes or len(boxes) != len(targets):
            raise UserError(
                f"level has {len(boxes)} boxes and {len(targets)} targets; expected equal numbers, at least 1"
            )
        return cls(height, width, tuple(cells["#"]), targets, boxes, players[0])

    @property
    def start(self) -> State:
        """The initial state."""
        return self.player, self.boxes

    def rows(self, state: State | None = None) -> list[str]:
        """ASCII rows (XSB) of a state; by default, of the initial state."""
        player, boxes = self.start if state is None else state
        grid = [" "] * (self.height * self.width)
        for cell in self.walls:
            grid[cell] = "#"
        for cell in self.targets:
            grid[cell] = "."
        for cell in boxes:
            grid[cell] = "*" if grid[cell] == "." else "$"
        grid[player] = "+" if grid[player] == "." else "@"
        text = "".join(grid)
        return [text[i : i + self.width] for i in range(0, len(text), self.width)]

    def ascii(self, state: State | None = None) -> str:
        """`rows` joined by newlines."""
        return "\n".join(self.rows(state))

    def at(self, state: State) -> Level:
        """The same room with `state` as the initial state."""
        return Level(self.height, self.width, self.walls, self.targets, state[1], state[0])

    def cell_name(self, cell: int) -> str:
        """``r2c3`` for row 2, column 3 (0-based, border included)."""
        return f"r{cell // self.width}c{cell % self.width}"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """`cell_name` of every cell."""
        return tuple(self.cell_name(cell) for cell in range(self.height * self.width))

    @cached_property
    def id(self) -> str:
        """Hash of `canonical_form`, 16 hex digits: levels that are the same puzzle have the same id."""
        return hashlib.sha256(self.canonical_form().encode()).hexdigest()[:16]

    def canonical_form(self) -> str:
        """Rows of text that are equal for levels that are the same puzzle.

        Four differences don't matter: the room's position in its frame, floor out of reach, rotations and reflections,
        and where the player starts within the area that it can walk without a push. That area is written as ``a``, or
        ``A`` on a target.
        """
        level = self.cropped()
        walk = level.reach(blocked=level.boxes)
        cells = list("".join(level.rows()))
        for cell in walk:
            cells[cell] = "A" if cell in level.targets else "a"
        rows = ["".join(cells[i : i + level.width]) for i in range(0, len(cells), level.width)]
        return min("\n".join(turned) for turned in symmetries(rows))

    def cropped(self) -> Level:
        """The same puzzle without floor out of reach and without margins: walls all around, one cell thick."""
        room = self.reach() | {*self.boxes, *self.targets}
        top, left = min(cell // self.width for cell in room) - 1, min(cell % self.width for cell in room) - 1
        height = max(cell // self.width for cell in room) - top + 2
        width = max(cell % self.width for cell in room) - left + 2

        def moved(cells: Iterable[int]) -> tuple[int, ...]:
            return tuple(sorted((cell // self.width - top) * width + cell % self.width - left for cell in cells))

        walls = sorted(set(range(height * width)).difference(moved(room)))
        return Level(height, width, tuple(walls), moved(self.targets), moved(self.boxes), moved((self.player,))[0])

    def reach(self, blocked: Collection[int] = ()) -> set[int]:
        """The cells that are connected to the player by floor, without passing the cells in `blocked`."""
        reached, frontier = {self.player}, [self.player]
        for cell in frontier:
            for ahead in self.neighbours[cell]:
                if ahead >= 0 and ahead not in blocked and ahead not in reached:
                    reached.add(ahead)
                    frontier.append(ahead)
        return reached

    @cached_property
    def neighbours(self) -> tuple[tuple[int, int, int, int], ...]:
        """``neighbours[cell][move]`` is the next cell, or -1 at a wall or the edge of the room."""
        walls = frozenset(self.walls)
        table = []
        for cell in range(self.height * self.width):
            row, column = divmod(cell, self.width)
            around = []
            for down, right in STEPS:
                r, c = row + down, column + right
                inside = 0 <= r < self.height and 0 <= c < self.width
                around.append(r * self.width + c if inside and r * self.width + c not in walls else -1)
            table.append((around[0], around[1], around[2], around[3]))
        return tuple(table)

    @cached_property
    def floor(self) -> tuple[int, ...]:
        """The cells that are not walls, sorted."""
        walls = frozenset(self.walls)
        return tuple(cell for cell in range(self.height * self.width) if cell not in walls)

    @cached_property
    def push_distance(self) -> dict[int, int]:
        """Cell -> fewest pushes that move a single box from there to any target, ignoring the player's position.

        Computed by pulling boxes away from the targets. Absent cells are dead squares: a box there can never reach a
        target, regardless of the other boxes.
        """
        distance = dict.fromkeys(self.targets, 0)
        frontier = list(self.targets)
        for box in frontier:
            for move in range(4):
                # A push in the opposite direction moves the box from `back`, if the player can stand behind it.
                back = self.neighbours[box][move]
                if back < 0 or back in distance:
                    continue
                if self.neighbours[back][move] >= 0:
                    distance[back] = distance[box] + 1
                    frontier.append(back)
        return distance

    def play(self, state: State, move: int) -> State | None:
        """The state after a move, or None if the move is blocked. Only pushes change the boxes."""
        player, boxes = state
        ahead = self.neighbours[player][move]
        if ahead < 0:
            return None
        if ahead not in boxes:
            return ahead, boxes
        beyond = self.neighbours[ahead][move]
        if beyond < 0 or beyond in boxes:
            return None
        if len(boxes) == 1:
            return ahead, (beyond,)
        return ahead, tuple(sorted(beyond if box == ahead else box for box in boxes))

    def is_solved(self, state: State) -> bool:
        """Whether every box is on a target."""
        return state[1] == self.targets

    def on_target(self, state: State) -> int:
        """Number of boxes on targets."""
        return sum(box in self.targets for box in state[1])

    def is_dead(self, state: State) -> bool:
        """Whether the state is a recognised deadlock. Sound but incomplete: some unsolvable states are missed.

        Two checks: a box on a dead square, and a box off target that walls and other boxes freeze in place.
        """
        boxes = state[1]
        if any(box not in self.push_distance for box in boxes):
            return True
        if len(boxes) == 1:  # a single box frozen off target is on a dead square
            return False
        frozen: set[int] = set()
        for box in boxes:
            frozen |= self._frozen_with(box, frozenset(boxes))
        return any(box not in self.targets for box in frozen)

    def _frozen_with(self, box: int, boxes: frozenset[int]) -> set[int]:
        """The boxes that freeze `box` in place, including itself; empty if it may be movable."""
        frozen: set[int] = set()
        assumed = frozenset({box})
        for axis in ((0, 1), (2, 3)):
            blockers = self._blocked(box, axis, boxes, assumed)
            if blockers is None:
                return set()
            frozen |= blockers
        return frozen | {box}

    def _blocked(
        self, box: int, axis: tuple[int, int], boxes: frozenset[int], assumed: frozenset[int]
    ) -> set[int] | None:
        """The boxes that prevent `box` from ever moving usefully along `axis`; None if it may move.

        `assumed` are the boxes assumed immovable further up the recursion. They count as walls: this ends the
        recursion, and is correct because either all of them are frozen or none is.
        """
        one, other = self.neighbours[box][axis[0]], self.neighbours[box][axis[1]]
        if one < 0 or other < 0 or one in assumed or other in assumed:
            return set()
        if one not in self.push_distance and other not in self.push_distance:
            return set()  # both directions lead to dead squares
        across = (2, 3) if axis == (0, 1) else (0, 1)
        for neighbour in (one, other):
            if neighbour in boxes:
                blockers = self._blocked(neighbour, across, boxes, assumed | {box})
                if blockers is not None:
                    return blockers | {neighbour}
        return None


def symmetries(rows: Sequence[str]) -> Iterator[list[str]]:
    """The eight rotations and reflections of a rectangle of text."""
    current = list(rows)
    for _ in range(4):
        yield current
        yield [row[::-1] for row in current]
        current = ["".join(column) for column in zip(*reversed(current), strict=True)]


def count_pushes(level: Level, state: State, moves: Sequence[int]) -> int:
    """Number of pushes among the moves, played from `state`.

    Raises:
        ValueError: if a move is blocked.
    """
    pushes = 0
    for move in moves:
        after = level.play(state, move)
        if after is None:
            raise ValueError(f"{MOVES[move]} is blocked in\n{level.ascii(state)}")
        pushes += after[1] != state[1]
        state = after
    return pushes
