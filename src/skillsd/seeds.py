"""Seeds that depend on names, not on order: the same in every process, whatever ran before."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the run's seed and the names of what it is for, e.g. (seed, "rollout", iteration, task)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
