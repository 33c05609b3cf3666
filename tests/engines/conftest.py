from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from engines import tiny

Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Name of an architecture -> folder with a tiny random model of it."""

    @cache
    def folder(name: str) -> Path:
        kind, options = tiny.ARCHITECTURES[name]
        return tiny.write(tmp_path_factory.mktemp(name), kind, options)

    return folder
