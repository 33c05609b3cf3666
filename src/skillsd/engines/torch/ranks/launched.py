"""What torchrun tells a process about itself. Light: no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from skillsd.errors import UserError


def size() -> int:
    """Number of ranks that torchrun has started; 1 for a process that it has not started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """This process's number. Rank 0 leads."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def restarts() -> int:
    """How often torchrun has started the ranks again, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if size() > 1 else 0


def check_one_machine() -> None:
    """Refuse ranks on several machines.

    Raises:
        UserError: if torchrun has started some elsewhere.
    """
    if size() != (here := int(os.environ.get("LOCAL_WORLD_SIZE", size()))):
        raise UserError(
            f"torchrun started {size()} ranks, {here} of them on this machine: expected all on one. Use --standalone "
            "(docs/scale.md)"
        )


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that is not one of the ranks: without what torchrun has set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    return {name: value for name, value in environment.items() if not name.startswith(names)}
