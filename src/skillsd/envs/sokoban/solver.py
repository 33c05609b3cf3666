"""Optimal solutions, by number of moves: A* for one level, and a table of all solvable states for small rooms."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from skillsd.envs.sokoban.board import OPPOSITE, Level, State


def solve(level: Level, state: State | None = None, *, limit: int = 2_000_000) -> list[int] | None:
    """A shortest solution from `state` (default: the initial state) by A*; None if the level is unsolvable.

    The heuristic is the sum over boxes of the pushes a single box would need. Every push is a move, so it never
    overestimates and the solution is optimal.

    Raises:
        RuntimeError: after visiting `limit` states, so that a large level can't hang a run.
    """
    start = level.start if state is None else state
    if level.is_dead(start):
        return None
    distance = level.push_distance
    came: dict[State, tuple[State, int] | None] = {start: None}
    cost = {start: 0}
    # Ties: deeper states first, then insertion order (the counter), so states are never compared.
    heap = [(sum(distance[box] for box in start[1]), 0, 0, start)]
    counter = 0
    while heap:
        _, negative_cost, _, current = heapq.heappop(heap)
        moves_so_far = -negative_cost
        if moves_so_far > cost[current]:
            continue
        if level.is_solved(current):
            return _path(came, current)
        for move in range(4):
            after = level.play(current, move)
            if after is None or cost.get(after, moves_so_far + 2) <= moves_so_far + 1:
                continue
            if after[1] != current[1] and level.is_dead(after):
                continue
            came[after] = (current, move)
            cost[after] = moves_so_far + 1
            counter += 1
            if counter > limit:
                raise RuntimeError(f"no solution found within {limit} states; the level is too large for this solver")
            estimate = moves_so_far + 1 + sum(distance[box] for box in after[1])
            heapq.heappush(heap, (estimate, -(moves_so_far + 1), counter, after))
    return None


def _path(came: dict[State, tuple[State, int] | None], end: State) -> list[int]:
    moves = []
    step = came[end]
    while step is not None:
        moves.append(step[1])
        step = came[step[0]]
    return moves[::-1]


@dataclass(frozen=True)
class DistanceTable:
    """All solvable states of a room with its targets, with their distance to a solved state.

    Attributes:
        moves: state -> fewest moves to a solved state; unsolvable states are absent.
        pushes: state -> fewest pushes among the solutions with the fewest moves.
        layers: ``layers[d]`` lists the states at distance d, in a deterministic order.
    """

    level: Level
    moves: dict[State, int]
    pushes: dict[State, int]
    layers: list[list[State]]

    def best_moves(self, state: State) -> list[int]:
        """The optimal moves in a state, in the order of `MOVES`; empty if it is solved or unsolvable."""
        to_go = self.moves.get(state, 0)
        if to_go == 0:
            return []
        return [
            move
            for move in range(4)
            if (after := self.level.play(state, move)) is not None and self.moves.get(after) == to_go - 1
        ]


def distance_table(level: Level) -> DistanceTable:
    """Breadth-first search backwards (step back, pull) from all solved states.

    For rooms with a few thousand states (cells x box placements). About 0.2 ms for one box in a 4x4 interior, 1-2 ms
    for two.
    """
    neighbours = level.neighbours
    targets = level.targets
    layer: list[State] = [(cell, targets) for cell in level.floor if cell not in targets]
    moves: dict[State, int] = dict.fromkeys(layer, 0)
    pushes: dict[State, int] = dict.fromkeys(layer, 0)
    layers: list[list[State]] = []
    while layer:
        layers.append(layer)
        to_go = len(layers)
        following: list[State] = []
        for state in layer:
            player, boxes = state
            pushed = pushes[state]
            around = neighbours[player]
            for move in range(4):
                behind = around[OPPOSITE[move]]
                if behind < 0 or behind in boxes:
                    continue
                before = (behind, boxes)
                known = moves.setdefault(before, to_go)
                if known == to_go:
                    if before not in pushes:
                        pushes[before] = pushed
                        following.append(before)
                    elif pushed < pushes[before]:
                        pushes[before] = pushed
                ahead = around[move]
                if ahead < 0 or ahead not in boxes:
                    continue
                if len(boxes) == 1:
                    before = (behind, (player,))
                else:
                    before = (behind, tuple(sorted(player if box == ahead else box for box in boxes)))
                known = moves.setdefault(before, to_go)
                if known == to_go:
                    if before not in pushes:
                        pushes[before] = pushed + 1
                        following.append(before)
                    elif pushed + 1 < pushes[before]:
                        pushes[before] = pushed + 1
        layer = following
    return DistanceTable(level, moves, pushes, layers)
