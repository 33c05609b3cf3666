"""OpenEnv, both ways: play on any OpenEnv server, and serve our task sets to its clients. docs/openenv.md."""

from skillsd.envs.openenv.environment import OpenEnv

__all__ = ["OpenEnv"]
