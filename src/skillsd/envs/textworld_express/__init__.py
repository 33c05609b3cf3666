"""TextWorld-Express: eight text games on their original engine (docs/environments.md)."""

from skillsd.envs.textworld_express.environment import TextWorldExpress

__all__ = ["TextWorldExpress"]
