"""The cache folder: fetched models and the AppWorld installation."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """``$SKILLSD_CACHE``, ``$XDG_CACHE_HOME/skillsd`` or ``~/.cache/skillsd``."""
    if given := os.environ.get("SKILLSD_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "skillsd"
