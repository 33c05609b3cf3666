"""The servers of the Tinker protocol, and where they differ. Light: imports no SDK."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Server:
    """What a server does with the protocol's requests.

    Attributes:
        sdk: beginning of the versions of the package ``tinker`` that it answers; empty: the newest.
        sums: the loss ``importance_sampling`` is the sum over all tokens of a step, as the protocol defines it. False:
            the mean over each sequence's tokens, then over the step's sequences.
        clips: an optimiser step clips the gradient at the norm that the request gives.
        keeps_snapshots: saved sampler weights can be used while training goes on.
    """

    sdk: str
    sums: bool
    clips: bool
    keeps_snapshots: bool


SERVERS: Mapping[str, Server] = {
    "tinker": Server(sdk="", sums=True, clips=True, keeps_snapshots=True),
    # FSDP2 or Megatron with vLLM. It clips by its own configuration, and samples with the newest saved weights only.
    "skyrl": Server(sdk="0.25.", sums=True, clips=False, keeps_snapshots=False),
    # To sample with saved weights it loads them into the adapter that is trained: older ones would replace the student.
    "skyrl-jax": Server(sdk="0.25.", sums=False, clips=False, keeps_snapshots=False),
}
"""``engine.server`` -> its behaviour. SkyRL's as of 0.4.0."""
