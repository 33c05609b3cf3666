"""AppWorld: the original engine, in its own virtual environment and processes. skillsd never imports `appworld`."""

from skillsd.envs.appworld.environment import AppWorld

__all__ = ["AppWorld"]
