"""Fixtures shared by several files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from skillsd.envs.appworld import AppWorld, paths
from skillsd.errors import UserError


@pytest.fixture(scope="module")
def task_set() -> Iterator[AppWorld]:
    """Our own tasks on AppWorld's engine; skips if it isn't installed."""
    try:
        paths.python()
        made = AppWorld(style="short", max_turns=8, max_observation_chars=1000, code_seconds=60)
    except UserError as error:
        pytest.skip(str(error))
    yield made
    made.host().stop()
