"""ScienceWorld: thirty kinds of elementary science tasks on their original engine (docs/environments.md)."""

from skillsd.envs.scienceworld.environment import ScienceWorld

__all__ = ["ScienceWorld"]
