"""A client of endpoints that speak OpenAI's chat completions: OpenAI's own, vLLM, llama.cpp, Ollama ...

Requests go through the `openai` client: paced, retried where that can help, counted, and limited by a budget. The key
comes from the environment and is used for requests only; if an answer repeats it, it is masked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from skillsd.engines.endpoint_answers import Answer, RequestError, http_error, read_answer
from skillsd.engines.endpoint_options import EndpointOptions
from skillsd.errors import UserError
from skillsd.types import Message

log = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
BACKOFF_SECONDS = 1.0
"""Delay before the first retry of a request; it doubles with each further one."""
LONGEST_DELAY = 60.0
"""Seconds. A request is not retried if the server asks for a longer delay."""
SHORTEST_SECRET = 12
"""Characters. Shorter keys ("EMPTY", "x") are placeholders for local servers; masking them would corrupt answers."""

Names = Mapping[str, str]
"""Setting -> its name where the user gives it, for messages: ``{"api_key_env": "--key-env", ...}``."""


class EndpointError(Exception):
    """No answer, after all retries.

    Attributes:
        reason: ``skipped_budget``, or that of a `RequestError`.
        status: of the HTTP response, if it is an error.
        transient: the server failed, not the request: asking again later may help.
        too_long: the server states in a machine-readable field that the messages do not fit into the model's context.
            Many servers state it in words only.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        status: int | None = None,
        transient: bool = False,
        too_long: bool = False,
    ) -> None:
        super().__init__(message)
        self.reason, self.status, self.transient, self.too_long = reason, status, transient, too_long


class Endpoint:
    """A client for one model behind an endpoint.

    Args:
        options: including the model's name.
        counts: updated with ``calls`` (requests made), ``retries``, ``tokens_in``, ``tokens_out``,
            ``calls_without_usage`` (answers without token counts, estimated at four characters per token), and
            ``answers_refused``, ``answers_empty``, ``answers_tool_calls`` (see `read_answer`). Budgets apply to these
            counts, so they survive a restart if the counts do.
        names: the settings' names, for messages.

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
        self._random = random.Random()  # for delays only: no result depends on it

    async def ask(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> Answer:
        """The model's answer, with as many retries as the options allow.

        Args:
            temperature: None takes the endpoint's own.
            schema: a ``response_format`` for the answer. If the server refuses it, this and all later requests are sent
                without one, so the answer has to be validated either way.

        Raises:
            EndpointError: if there is no answer.
        """
        body: dict[str, Any] = {
            "model": self._options.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            # OpenAI's newer models refuse the old name, and many other servers don't know the new one.
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
            except RequestError as failure:
                if with_schema and failure.status in (400, 422) and not failure.too_long:  # of the schema, maybe
                    with_schema = False
                    continue
                delay = failure.delay or self._backoff(tries)
                if not failure.transient or tries == self._options.max_retries or delay > LONGEST_DELAY:
                    raise EndpointError(
                        failure.reason,
                        self._explain(failure),
                        status=failure.status,
                        transient=failure.transient and delay <= LONGEST_DELAY,
                        too_long=failure.too_long,
                    ) from None
                if failure.delay:
                    self._pace.pause(delay)  # the server's limit is for all requests
                tries += 1
                self._counts["retries"] += 1
                await asyncio.sleep(delay)
            else:
                if schema and self._takes_schema and not with_schema:
                    self._takes_schema = False
                    log.warning("%s refuses the JSON schema: requests are sent without it from now on", self.address)
                return answer

    async def _request(self, body: Mapping[str, Any]) -> Answer:
        """One request. Raises RequestError instead of the client's own exception, which contains the key."""
        import openai

        options = self._options
        self._counts["calls"] += 1
        try:
            async with asyncio.timeout(options.timeout_seconds):
                answer: Any = await self._client.chat.completions.create(**body, extra_body=options.request)
            read, tallies = read_answer(answer, body["messages"])
        except (TimeoutError, openai.APITimeoutError):
            raise RequestError("timeout", f"no answer within {options.timeout_seconds:g} s") from None
        except openai.APIStatusError as error:
            text = self._shown(error.message)
            raise http_error(error.status_code, text, error.body, error.response.headers) from None
        except openai.APIConnectionError as error:
            raise RequestError("connection", self._shown(f"{error} {error.__cause__ or ''}")) from None
        except (openai.APIError, ValueError) as error:
            raise RequestError("response", self._shown(f"no completion: {error}")) from None
        except RequestError as error:
            error.args = (self._shown(str(error)),)
            raise
        self._counts.update(tallies)
        self._counts["tokens_in"] += read.tokens_in
        self._counts["tokens_out"] += read.tokens_out
        if tallies[:1] == ["answers_tool_calls"] and self._counts["answers_tool_calls"] == 1:
            log.warning(
                "%s turned an answer into tool calls, although no tools were offered: their text is lost. Start the "
                "server without a parser of tool calls",
                self.address,
            )
        return read._replace(text=self._without_key(read.text))

    def check_budget(self) -> None:
        """Raise EndpointError if a budget is spent."""
        options = self._options
        tokens = self._counts["tokens_in"] + self._counts["tokens_out"]
        for key, spent in (("budget_calls", self._counts["calls"]), ("budget_tokens", tokens)):
            budget = getattr(options, key)
            if budget is not None and spent >= budget:
                name = self._names.get(key, key)
                raise EndpointError("skipped_budget", f"{name} is {budget}, and {spent} are spent")

    def _backoff(self, tries: int) -> float:
        longest: float = min(LONGEST_DELAY, BACKOFF_SECONDS * 2**tries)
        return longest * self._random.uniform(0.5, 1.0)

    def _explain(self, failure: RequestError) -> str:
        """What went wrong and what to do about it."""
        about = ""
        if failure.status in (401, 403):
            name = _key_name(self._options)
            about = (
                f"it refuses the key of ${name}"
                if name
                else f"it needs a key: name its environment variable in {self._names['api_key_env']}"
            )
        elif failure.status == 404:
            about = (
                f"it has no model {self._options.model!r} ({self._names['model']}), or the address is wrong "
                f"({self._names['base_url']}; it usually ends in /v1)"
            )
        elif failure.delay is not None and failure.delay > LONGEST_DELAY:
            about = f"it asks for a wait of {failure.delay:,.0f} s, more than {LONGEST_DELAY:g} s"
        return f"{self.address}: {about and about + '. Its answer: '}{failure}"

    def _shown(self, text: str) -> str:
        """A server's words, for a message."""
        return self._without_key(text)[:300]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key and len(self._key) >= SHORTEST_SECRET else text


class _Pace:
    """Limits the rate of requests: evenly spaced, and none during a pause."""

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


def _key_name(options: EndpointOptions) -> str | None:
    """The environment variable of the key. OpenAI's key is sent to no other address unless it is named explicitly."""
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
            f"out {names['api_key_env']}.)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"the environment variable {name!r} does not hold a key: its value has spaces or other odd characters"
        )
    return key


def check_access(options: EndpointOptions, names: Names) -> None:
    """Raise UserError if the key or the package openai is missing, before a model is loaded."""
    _key(options, names)
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError(f"requests to {options.base_url or OPENAI} need a package: pip install openai") from error


def _client(address: str, key: str | None, names: Names) -> Any:
    import openai

    try:
        return openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=address,
            # We do deadlines and retries ourselves, so that every request is counted, paced and within the budget.
            timeout=None,
            max_retries=0,
            # No connection stays open between requests: the event loop may end at any time without closing it.
            default_headers={"Connection": "close"},
        )
    except Exception as error:  # a bad address, or a bad proxy or certificate in the environment
        raise UserError(
            f"{address!r} ({names['base_url']}) can't be asked: {error}. Expected an address such as "
            "http://localhost:8000/v1. Proxies and certificates set in the environment apply, too"
        ) from None
