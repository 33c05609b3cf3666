"""Access to a language model behind an endpoint, and its budget. Imports no client."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from skillsd.options import JsonObject, Options


def _variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("expected the name of an environment variable, not the key itself")
    return name


def _address(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an address such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            "expected no credentials or query in the address, which is written to files: name the environment variable "
            "of the key instead"
        )
    try:
        _ = parts.port  # parsed, and checked, on access
    except ValueError:
        raise ValueError("its port has to be a number up to 65535, as in http://localhost:8000/v1") from None
    return address


VariableName = Annotated[str, AfterValidator(_variable_name)]
"""The name of an environment variable that holds a key. A key given by mistake is refused."""

Address = Annotated[str, AfterValidator(_address)]
"""The address of a server, without credentials."""


class EndpointOptions(Options):
    """A language model behind an endpoint that speaks OpenAI's chat completions, and what it may cost."""

    model: str | None = None
    """The model's name at the endpoint."""
    base_url: Address | None = None
    """The endpoint's address, usually ending in ``/v1``. None is OpenAI's own."""
    api_key_env: VariableName | None = None
    """Name of the environment variable that holds the key; the key itself is never written anywhere. None is
    ``OPENAI_API_KEY`` for OpenAI's own address, and no key for another ``base_url``."""
    request: JsonObject = Field(default_factory=dict)
    """More fields of the endpoint's requests (``seed``, ``reasoning_effort``, ``chat_template_kwargs`` ...)."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Deadline of one request."""
    max_retries: int = Field(4, ge=0)
    """How often a request is repeated after 408, 409, 429, 5xx, a timeout or a broken connection."""
    requests_per_minute: float | None = Field(None, gt=0)
    """The highest rate at which requests are sent. None is no limit."""
    budget_calls: int | None = Field(None, ge=0)
    """No more requests are made after so many in all. None is no limit."""
    budget_tokens: int | None = Field(None, ge=0)
    """No more requests are made after so many tokens, prompts and answers together; those under way are finished."""
    price_in: float | None = Field(None, ge=0)
    """Price of a million tokens of prompts, in any currency, for the metric ``summaries/cost``."""
    price_out: float | None = Field(None, ge=0)
    """Price of a million tokens of answers."""

    ACCESS: ClassVar = (
        *("base_url", "api_key_env", "timeout_seconds", "max_retries", "requests_per_minute"),
        *("budget_calls", "budget_tokens", "price_in", "price_out"),
    )
    """Keys about access and cost, which don't affect the answers: they may change when a run is resumed."""

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """In the prices' currency; None without prices. If only one price is given, the other counts as 0."""
        if self.price_in is None and self.price_out is None:
            return None
        return (tokens_in * (self.price_in or 0) + tokens_out * (self.price_out or 0)) / 1e6
