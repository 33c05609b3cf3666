"""The folder in which weights are handed to a sampler in another process."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def weights_folder(size: int) -> Path:
    """A new folder: in memory (``/dev/shm``) if it has room for `size` bytes, else in the temporary folder."""
    memory = "/dev/shm"
    room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1.1 * size
    return Path(tempfile.mkdtemp(prefix="skillsd-weights-", dir=memory if room else None))
