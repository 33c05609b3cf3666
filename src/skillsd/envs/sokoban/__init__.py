"""Sokoban: rules, solver, seeded levels, environment, rule-based summariser, demonstrations."""

from skillsd.envs.sokoban.environment import Sokoban

__all__ = ["Sokoban"]
