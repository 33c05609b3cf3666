"""Sokoban: rules, solver, seeded levels, the environment, its rule-based summariser and its demonstrations."""

from skillsd.envs.sokoban.environment import Sokoban

__all__ = ["Sokoban"]
