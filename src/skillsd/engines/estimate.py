"""An engine's estimate of a run's memory and time, before it starts (`EngineOptions.estimator`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from skillsd.engines.spec import EngineSpec

SAMPLING, SCORING, UPDATE = "sampling", "the teacher's scores", "update"
"""Phases of an iteration."""


@dataclass(frozen=True)
class Workload:
    """Size of an iteration, if every episode uses its whole token budget.

    Attributes:
        episodes: in all groups.
        turns: per episode, at most.
        turn_tokens: sampled per turn, at most.
        trajectory_tokens: per episode, prompt and observations included.
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
        stays: memory in use throughout, by purpose.
        phases: phase of an iteration -> further memory, by purpose.
        seconds: of each phase; empty if the device's speed is unknown.
        note: what the estimate leaves out, where that matters for this model.
    """

    stays: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    seconds: Mapping[str, float]
    note: str = ""

    @property
    def need(self) -> int:
        """Peak memory in bytes."""
        return sum(self.stays.values()) + max(sum(parts.values()) for parts in self.phases.values())


class Estimator(Protocol):
    """Estimates for this machine.

    Attributes:
        device: its name, as shown to the user.
        free: bytes available there.
        total: bytes in all.
    """

    device: str
    free: int
    total: int

    def __call__(self, spec: EngineSpec, workload: Workload) -> Estimate: ...
