"""Scripted policies for the demonstrations: an expert, a careless player, and one that follows a plan.

A policy may keep a plan between moves. If the state is not the one its last move should have led to (noise), it plans
again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Protocol

from skillsd.envs.sokoban.board import OPPOSITE, Level, State
from skillsd.envs.sokoban.levels import pick
from skillsd.envs.sokoban.solver import DistanceTable


class ScriptedPolicy(Protocol):
    """Chooses moves by rules, without a model."""

    def move(self, state: State) -> int:
        """The move to make in `state`, an index into `MOVES`."""


class Expert:
    """Plays a random optimal move; in unsolvable states, a random move that is not blocked."""

    def __init__(self, table: DistanceTable, rng: random.Random) -> None:
        self._table = table
        self._rng = rng

    def move(self, state: State) -> int:
        best = self._table.best_moves(state)
        return pick(self._rng, best) if best else random_move(self._table.level, state, self._rng)


class RecklessPusher:
    """Repeats: pick a random reachable push, walk there by a shortest path, push.

    Ignores deadlocks. If no push is possible, it moves at random.

    Args:
        avoid: a player cell and a move that is never made there, neither to push nor to walk (the mistake that a
            skill warns about).
    """

    def __init__(self, level: Level, rng: random.Random, avoid: tuple[int, int] | None = None) -> None:
        self._level = level
        self._rng = rng
        self._avoid = avoid
        self._planned: list[int] = []  # moves still to make, in reverse order
        self._expected: State | None = None

    def move(self, state: State) -> int:
        if not self._planned or state != self._expected:
            self._planned = self._plan(state)
        if not self._planned:
            move = random_move(self._level, state, self._rng, self._avoid)
        else:
            move = self._planned.pop()
        self._expected = self._level.play(state, move)
        return move

    def _plan(self, state: State) -> list[int]:
        player, boxes = state
        neighbours = self._level.neighbours
        last_moves = reachable(self._level, state, self._avoid)
        pushes = []
        for box in boxes:
            for move in range(4):
                behind, beyond = neighbours[box][OPPOSITE[move]], neighbours[box][move]
                if behind in last_moves and beyond >= 0 and beyond not in boxes and (behind, move) != self._avoid:
                    pushes.append((behind, move))
        if not pushes:
            return []
        cell, push = pick(self._rng, pushes)
        moves = [push]
        while cell != player:
            moves.append(last_moves[cell])
            cell = neighbours[cell][OPPOSITE[last_moves[cell]]]
        return moves


class Follower:
    """Follows a plan in the states it covers, and another policy elsewhere."""

    def __init__(self, plan: Mapping[State, int], fallback: ScriptedPolicy) -> None:
        self._plan = plan
        self._fallback = fallback

    def move(self, state: State) -> int:
        planned = self._plan.get(state)
        return self._fallback.move(state) if planned is None else planned


def reachable(level: Level, state: State, avoid: tuple[int, int] | None = None) -> dict[int, int]:
    """The cells that the player can reach without pushing -> the last move of a shortest path there.

    The player's own cell maps to -1. `avoid` is a (cell, move) pair that no path uses.
    """
    player, boxes = state
    last_moves = {player: -1}
    frontier = [player]
    for cell in frontier:
        for move, following in enumerate(level.neighbours[cell]):
            if following < 0 or following in last_moves or following in boxes or (cell, move) == avoid:
                continue
            last_moves[following] = move
            frontier.append(following)
    return last_moves


def random_move(level: Level, state: State, rng: random.Random, avoid: tuple[int, int] | None = None) -> int:
    """A random move that is neither blocked nor to be avoided; any move if there is none."""
    free = [m for m in range(4) if level.play(state, m) is not None and (state[0], m) != avoid]
    return pick(rng, free or [0, 1, 2, 3])
