"""Who plays in demonstrations: an expert, a reckless pusher, and one who follows the plan of a skill.

An actor is asked for a move in a state and may remember what it intends; when the state is not the one that
its last move should have led to (noise), it thinks again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Protocol

from skillsd.envs.sokoban.board import OPPOSITE, Level, State
from skillsd.envs.sokoban.levels import pick
from skillsd.envs.sokoban.solver import DistanceTable


class Actor(Protocol):
    """Chooses moves."""

    def move(self, state: State) -> int:
        """The move to make in `state`, an index into `MOVES`."""


class Expert:
    """Plays a random one of the optimal moves; in a state that can't be solved any more, any legal move."""

    def __init__(self, table: DistanceTable, rng: random.Random) -> None:
        self._table = table
        self._rng = rng

    def move(self, state: State) -> int:
        best = self._table.best_moves(state)
        return pick(self._rng, best) if best else wander(self._table.level, state, self._rng)


class RecklessPusher:
    """Picks a random push that it can walk to, walks there by a shortest path, pushes, and picks again.

    It never thinks of deadlocks. When nothing can be pushed any more, it wanders.

    Args:
        refused: a player's cell and a move that it never makes there, not even to walk: somebody warned it.
    """

    def __init__(self, level: Level, rng: random.Random, refused: tuple[int, int] | None = None) -> None:
        self._level = level
        self._rng = rng
        self._refused = refused
        self._intended: list[int] = []  # moves still to make, the last one first
        self._expected: State | None = None

    def move(self, state: State) -> int:
        if not self._intended or state != self._expected:
            self._intended = self._choose(state)
        if not self._intended:
            move = wander(self._level, state, self._rng, self._refused)
        else:
            move = self._intended.pop()
        self._expected = self._level.play(state, move)
        return move

    def _choose(self, state: State) -> list[int]:
        player, boxes = state
        neighbours = self._level.neighbours
        came = reachable(self._level, state, self._refused)
        pushes = []
        for box in boxes:
            for move in range(4):
                behind, beyond = neighbours[box][OPPOSITE[move]], neighbours[box][move]
                if behind in came and beyond >= 0 and beyond not in boxes and (behind, move) != self._refused:
                    pushes.append((behind, move))
        if not pushes:
            return []
        cell, push = pick(self._rng, pushes)
        moves = [push]
        while cell != player:
            moves.append(came[cell])
            cell = neighbours[cell][OPPOSITE[came[cell]]]
        return moves


class Follower:
    """Follows a plan where the state is on it, and asks somebody else where it is not."""

    def __init__(self, plan: Mapping[State, int], otherwise: Actor) -> None:
        self._plan = plan
        self._otherwise = otherwise

    def move(self, state: State) -> int:
        planned = self._plan.get(state)
        return self._otherwise.move(state) if planned is None else planned


def reachable(level: Level, state: State, refused: tuple[int, int] | None = None) -> dict[int, int]:
    """The cells to which the player can walk without pushing, and the last move of a shortest way there.

    The player's own cell has the value -1. No way takes the `refused` move from the refused cell.
    """
    player, boxes = state
    came = {player: -1}
    frontier = [player]
    for cell in frontier:
        for move, following in enumerate(level.neighbours[cell]):
            if following < 0 or following in came or following in boxes or (cell, move) == refused:
                continue
            came[following] = move
            frontier.append(following)
    return came


def wander(level: Level, state: State, rng: random.Random, refused: tuple[int, int] | None = None) -> int:
    """A random move that is not blocked (nor refused); any move if there is none."""
    free = [m for m in range(4) if level.play(state, m) is not None and (state[0], m) != refused]
    return pick(rng, free or [0, 1, 2, 3])
