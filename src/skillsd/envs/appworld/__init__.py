"""AppWorld: the real engine in its own environment and processes; nothing here imports the package `appworld`."""

from skillsd.envs.appworld.environment import AppWorld

__all__ = ["AppWorld"]
