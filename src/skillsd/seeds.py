"""Seeds derived from names, so they do not depend on the order of execution and are the same in every process."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a parent seed and the names of its purpose, e.g. (seed, "rollout", iteration, task)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
