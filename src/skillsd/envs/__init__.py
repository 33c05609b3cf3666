"""Environments: the interface (`base`), lookup by name (`registry`) and checks for implementations (`conformance`)."""

from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.envs.registry import load, names

__all__ = ["Environment", "Step", "TaskSet", "load", "names"]
