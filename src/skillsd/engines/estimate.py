"""What a run would take, before it starts: the form of an engine's estimate (`EngineOptions.estimator`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from skillsd.engines.options import EngineSpec

SAMPLING, SCORING, UPDATE = "sampling", "the teacher's scores", "update"
"""Phases of an iteration."""


@dataclass(frozen=True)
class Workload:
    """What an iteration asks of an engine, if every episode uses its whole token budget.

    Attributes:
        want: which log-probs scoring and training need, see `skillsd.objective.Want.kind`.
    """

    episodes: int
    turns: int
    turn_tokens: int
    trajectory_tokens: int
    minibatches: int = 1
    epochs: int = 1
    want: Literal["chosen", "top_k", "whole"] = "chosen"


@dataclass(frozen=True)
class Estimate:
    """Memory in bytes and time in seconds.

    Attributes:
        stays: what is there all the time, by name.
        phases: what comes on top in each phase of an iteration, by name.
        seconds: of each phase of an iteration; empty if the device's speed is unknown.
        note: what the estimate leaves out, if that matters for this model.
    """

    stays: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    seconds: Mapping[str, float]
    note: str = ""

    @property
    def need(self) -> int:
        """The most bytes at once."""
        return sum(self.stays.values()) + max(sum(parts.values()) for parts in self.phases.values())


class Estimator(Protocol):
    """Estimates for this machine.

    Attributes:
        device: in words.
        free: bytes that can be had there.
        total: bytes that it has.
    """

    device: str
    free: int
    total: int

    def __call__(self, spec: EngineSpec, workload: Workload) -> Estimate: ...
