"""Where skillsd keeps what it fetched or built once: models, AppWorld."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """The cache folder: ``$SKILLSD_CACHE``, ``$XDG_CACHE_HOME/skillsd`` or ``~/.cache/skillsd``."""
    if given := os.environ.get("SKILLSD_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "skillsd"
