"""Rulebook: hidden rules that all tasks share, failures that tell what was right, a skill that says the rules."""

from skillsd.envs.rulebook.environment import Rulebook

__all__ = ["Rulebook"]
