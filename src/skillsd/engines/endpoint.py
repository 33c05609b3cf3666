"""A client of endpoints that speak OpenAI's chat completions: OpenAI's own, vLLM, llama.cpp, Ollama ...

Requests are made through the `openai` client (extra ``openai``): paced, repeated where that may help, counted, and held
within a budget. The key comes from the environment and goes nowhere but into the request; should the server
repeat it, it is struck out before anyone reads it.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from skillsd.engines.endpoint_options import EndpointOptions
from skillsd.errors import UserError
from skillsd.types import Message

log = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
BACKOFF_SECONDS = 1.0
"""The first rest between two tries of a request; each further one is twice as long."""
LONGEST_REST = 60.0
"""Seconds. A server that wants a longer rest is not asked again."""
SHORTEST_SECRET = 12
"""Characters. A shorter key ("EMPTY", "x") is a local server's dummy: striking it out would spoil the answers."""

Names = Mapping[str, str]
"""What a setting is called where the user gives it, for messages: ``{"api_key_env": "--key-env", ...}``."""


class Answer(NamedTuple):
    """A completion: its words, whether they were cut short, and the tokens that it took (guessed if not told)."""

    text: str
    cut: bool
    tokens_in: int
    tokens_out: int


class EndpointError(Exception):
    """No answer, after all tries.

    Attributes:
        reason: ``skipped_budget``, or ``failed_`` and what: ``http_429``, ``timeout``, ``connection``, ``response``.
        transient: asking again later may help: the server, not the request, is what failed.
        too_long: the model's context does not hold the messages.
    """

    def __init__(self, reason: str, message: str, *, transient: bool = False, too_long: bool = False) -> None:
        super().__init__(message)
        self.reason, self.transient, self.too_long = reason, transient, too_long


class Endpoint:
    """Asks one model behind an endpoint.

    Args:
        options: with the model's name.
        counts: here it counts ``calls`` (requests made), ``retries``, ``tokens_in``, ``tokens_out`` and
            ``calls_without_usage`` (answered without a count of tokens: a token is then taken to be four characters).
            The budgets are of these counts, so they hold across restarts if the counts do.
        names: what the settings are called where the user gives them.

    Raises:
        UserError: if the package openai or the key is missing.
    """

    def __init__(self, options: EndpointOptions, counts: Counter[str], names: Names) -> None:
        check_access(options, names)
        self._options, self._counts, self._names = options, counts, names
        self.address = options.base_url or OPENAI
        self._key = _key(options, names)
        self._client = _client(self.address, self._key, names)
        self._pace = _Pace(options.requests_per_minute)
        self._takes_schema = True
        self._random = random.Random()  # for the rests only: nothing of a run depends on it

    async def ask(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> Answer:
        """The model's answer; asked for again as often as the options say.

        Args:
            temperature: None takes the endpoint's own.
            schema: a ``response_format`` that the answer shall keep to. A server that refuses it is asked without, once
                and for all, so the answer has to be validated either way.

        Raises:
            EndpointError: if there is none.
        """
        body: dict[str, Any] = {
            "model": self._options.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            # OpenAI's newer models refuse the old name, many other servers do not know the new one.
            "max_completion_tokens" if self.address.rstrip("/") == OPENAI else "max_tokens": max_tokens,
        }
        if temperature is not None:
            body["temperature"] = temperature
        with_schema, tries = schema is not None and self._takes_schema, 0
        while True:
            await self._pace.turn()
            self.check_budget()
            try:
                answer = await self._request({**body, "response_format": schema} if with_schema else body)
            except _FailedError as failure:
                if with_schema and failure.status in (400, 422):  # what it refuses may be the schema
                    with_schema = False
                    continue
                rest = failure.rest or self._backoff(tries)
                if not failure.transient or tries == self._options.max_retries or rest > LONGEST_REST:
                    raise EndpointError(
                        failure.reason,
                        self._explain(failure),
                        transient=failure.transient and rest <= LONGEST_REST,
                        too_long=_too_long(failure),
                    ) from None
                if failure.rest:
                    self._pace.pause(rest)  # the server means everyone
                tries += 1
                self._counts["retries"] += 1
                await asyncio.sleep(rest)
            else:
                if schema and self._takes_schema and not with_schema:
                    self._takes_schema = False
                    log.warning("%s takes no JSON schema: it is asked without from now on", self.address)
                return answer

    async def _request(self, body: Mapping[str, Any]) -> Answer:
        """One request. Raises _FailedError, without the client's own exception: that one knows the key."""
        import openai

        options = self._options
        self._counts["calls"] += 1
        try:
            async with asyncio.timeout(options.timeout_seconds):
                answer: Any = await self._client.chat.completions.create(**body, extra_body=options.request)
        except (TimeoutError, openai.APITimeoutError):
            raise _FailedError("timeout", f"no answer within {options.timeout_seconds:g} s") from None
        except openai.APIStatusError as error:
            raise _FailedError(
                f"http_{error.status_code}",
                self._without_key(error.message)[:300],
                status=error.status_code,
                rest=_rest(error.response.headers),
                # OpenAI's 429 of an empty account does not pass.
                transient=_is_transient(error.status_code) and error.code != "insufficient_quota",
            ) from None
        except openai.APIConnectionError as error:
            raise _FailedError("connection", self._without_key(f"{error} {error.__cause__ or ''}")) from None
        except (openai.APIError, ValueError) as error:
            raise _FailedError("response", self._without_key(f"no completion: {error}")[:300]) from None
        return self._read(answer, body["messages"])

    def _read(self, answer: Any, asked: Sequence[Mapping[str, str]]) -> Answer:
        """The client does not check what a server sends."""
        try:
            choice = answer.choices[0]
            said = choice.message.content or ""
            if not isinstance(said, str):
                raise TypeError
        except (AttributeError, IndexError, KeyError, TypeError):
            given = self._without_key(repr(answer))[:300]
            raise _FailedError("response", f"the answer is no chat completion: {given}") from None
        used: list[Any] = [
            getattr(getattr(answer, "usage", None), name, None) for name in ("prompt_tokens", "completion_tokens")
        ]
        if not all(isinstance(tokens, int) and tokens >= 0 for tokens in used):
            self._counts["calls_without_usage"] += 1
            lengths = (sum(len(message["content"]) for message in asked), len(said))
            used = [math.ceil(length / 4) for length in lengths]
        self._counts["tokens_in"] += used[0]
        self._counts["tokens_out"] += used[1]
        return Answer(self._without_key(said), getattr(choice, "finish_reason", None) == "length", *used)

    def check_budget(self) -> None:
        """Raise EndpointError if there is nothing left to spend."""
        options = self._options
        tokens = self._counts["tokens_in"] + self._counts["tokens_out"]
        for key, spent in (("budget_calls", self._counts["calls"]), ("budget_tokens", tokens)):
            budget = getattr(options, key)
            if budget is not None and spent >= budget:
                name = self._names.get(key, key)
                raise EndpointError("skipped_budget", f"{name} is {budget}, and {spent} are spent")

    def _backoff(self, tries: int) -> float:
        longest: float = min(LONGEST_REST, BACKOFF_SECONDS * 2**tries)
        return longest * self._random.uniform(0.5, 1.0)

    def _explain(self, failure: _FailedError) -> str:
        """What is wrong, and what to do about it."""
        about = ""
        if failure.status in (401, 403):
            name = _key_name(self._options)
            about = (
                f"it refuses the key of ${name}"
                if name
                else f"it wants a key: name one in {self._names['api_key_env']}"
            )
        elif failure.status == 404:
            about = (
                f"it knows no model {self._options.model!r} ({self._names['model']}), or the address is wrong "
                f"({self._names['base_url']}; as a rule it ends in /v1)"
            )
        return f"{self.address}: {about and about + '. It says: '}{failure}"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key and len(self._key) >= SHORTEST_SECRET else text


class _FailedError(Exception):
    """A request that came to nothing.

    Attributes:
        status: of the HTTP answer, if there was one.
        rest: seconds that the server wants to be left alone, if it says so.
        transient: asking again may help.
    """

    def __init__(
        self, what: str, message: str, *, status: int | None = None, rest: float | None = None, transient: bool = True
    ) -> None:
        super().__init__(message)
        self.reason = f"failed_{what}"
        self.status, self.rest, self.transient = status, rest, transient


_TOO_LONG = re.compile(r"context[ _](length|window|size)|maximum context|prompt is too long", re.IGNORECASE)
"""How servers say that the messages do not fit: OpenAI and vLLM, llama.cpp, others. There is no code that all share."""


def _too_long(failure: _FailedError) -> bool:
    return failure.status in (400, 413, 422, 500) and bool(_TOO_LONG.search(str(failure)))


def _is_transient(status: int) -> bool:
    return status in (408, 409, 429) or status >= 500


class _Pace:
    """Lets requests begin at most so often, evenly spaced, and none while there is a pause."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = self._quiet_until = -math.inf

    async def turn(self) -> None:
        begin = max(time.monotonic(), self._next)
        self._next = begin + self._gap
        while (wait := max(begin, self._quiet_until) - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def pause(self, seconds: float) -> None:
        self._quiet_until = max(self._quiet_until, time.monotonic() + seconds)


def _rest(headers: Any) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None without a usable one."""
    given = headers.get("retry-after")
    if given is None:
        return None
    try:
        rest = float(given)
    except ValueError:
        try:
            rest = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, rest) if math.isfinite(rest) else None


def _key_name(options: EndpointOptions) -> str | None:
    """The environment variable of the key. OpenAI's own key goes to no other address unless the recipe says so."""
    own = (options.base_url or OPENAI).rstrip("/") == OPENAI
    return options.api_key_env or (OPENAI_KEY if own else None)


def _key(options: EndpointOptions, names: Names) -> str | None:
    name = _key_name(options)
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key and not (name in os.environ or name.isupper()):
        raise UserError(
            f"the variable named in {names['api_key_env']} is not set (not repeated here: it may be a key): give the "
            "name of an environment variable that holds the key, not the key itself"
        )
    if not key:
        raise UserError(
            f"the environment variable {name!r} holds no key for {options.base_url or OPENAI}: set it or name another "
            f"one in {names['api_key_env']}. (For a local server that needs no key: give {names['base_url']} and leave "
            f"{names['api_key_env']} out.)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"what the environment variable {name!r} holds is no key: there are blanks or other odd characters in it"
        )
    return key


def check_access(options: EndpointOptions, names: Names) -> None:
    """Raise UserError if the key or the package openai is missing: to be told before a model is loaded."""
    _key(options, names)
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{options.base_url or OPENAI} is asked through the package openai: pip install 'skillsd[openai]'"
        ) from error


def _client(address: str, key: str | None, names: Names) -> Any:
    import openai

    try:
        return openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=address,
            # Deadlines and retries are ours, so that every request is counted, paced and within the budget.
            timeout=None,
            max_retries=0,
            # Nothing stays open between requests: an event loop may end at any time, and there is nobody to close it.
            default_headers={"Connection": "close"},
        )
    except Exception as error:  # the address, or a proxy or certificate that the environment names
        raise UserError(
            f"{address!r} ({names['base_url']}) can't be asked: {error}. Expected an address such as "
            "http://localhost:8000/v1; a proxy or certificates named in the environment count too"
        ) from None
