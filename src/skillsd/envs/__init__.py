"""Environments: what an agent acts in. `base` says what one is, `registry` finds them, `conformance` checks them."""

from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.envs.registry import load, names

__all__ = ["Environment", "Step", "TaskSet", "load", "names"]
