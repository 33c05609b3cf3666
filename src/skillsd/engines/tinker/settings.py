"""Which server is asked, and how. Light: imports neither torch nor the SDK."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from skillsd.engines.endpoint_options import Address, VariableName
from skillsd.engines.tinker.servers import SERVERS, Server
from skillsd.options import Options


class Prices(Options):
    """Prices per million tokens in any currency, for the cost that `skillsd doctor` prints."""

    prefill: float | None = Field(None, ge=0)
    """Of a token of a prompt that the server has not cached."""
    cached: float | None = Field(None, ge=0)
    """Of a token of a prompt that is in the server's prefix cache. Default: as ``prefill``."""
    sample: float | None = Field(None, ge=0)
    """Of a sampled token."""
    train: float | None = Field(None, ge=0)
    """Of a token of a training pass."""
    score: float | None = Field(None, ge=0)
    """Of a token of a pass for its log-probs only. Default: as ``train``."""


class TinkerSettings(Options):
    """The keys of the section ``engine`` for a Tinker server."""

    server: Literal["tinker", "skyrl", "skyrl-jax"] = "tinker"
    """The kind of server: ``tinker``, the hosted service; ``skyrl``, SkyRL's with FSDP2 or Megatron; ``skyrl-jax``,
    SkyRL's with its JAX back end."""
    base_url: Address | None = None
    """The server's address, such as ``http://localhost:8000``. Default: the hosted service's."""
    base_model: str | None = None
    """The base model's name at the server. Default: ``model.name``, which tokenizer and chat template come from."""
    api_key_env: VariableName = "TINKER_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never written anywhere. SkyRL's server
    needs none."""
    timeout_seconds: float = Field(900.0, gt=0)
    """Deadline of one answer. The SDK repeats requests that fail on their way for up to 5 minutes of it."""
    max_retries: int = Field(3, ge=0)
    """How often sampling and scoring are requested again if the server has lost or failed the request."""
    route: Literal["auto", "general"] = "auto"
    """How gradients are requested. ``general``: score the batch, then train: exact for every loss on sampled tokens.
    ``auto``: without that scoring pass for the first minibatch after sampling, with the sampler's log-probs."""
    keep_days: float | None = Field(None, ge=1 / 24)
    """Days after which the server may delete the states of checkpoints. Default: never."""
    prices: Prices = Prices()

    @property
    def traits(self) -> Server:
        """How the server behaves."""
        return SERVERS[self.server]
