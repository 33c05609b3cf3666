"""A summariser behind an endpoint that speaks OpenAI's chat completions: OpenAI's own, vLLM, llama.cpp, Ollama ...

Requests are made through the `openai` client (extra ``openai``). The answer is constrained by the skill's JSON schema
where the server takes one; where it refuses that, it is asked without, once and for all. The answer is validated either
way. The key comes from the environment and goes nowhere but into the request; should the server repeat it, it is struck
out before anyone reads it.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import math
import os
import random
import time
from collections import Counter
from typing import Any

from skillsd.config import SummariserSection
from skillsd.errors import UserError
from skillsd.skills.prompt import SummaryPrompt, parse_skill
from skillsd.skills.summarise import SkillSchema, SummaryError
from skillsd.types import Skill, Trajectory

log = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
BACKOFF_SECONDS = 1.0
"""The first rest between two tries of a request; each further one is twice as long."""
LONGEST_REST = 60.0
"""Seconds. A server that wants a longer rest is not asked again for this summary."""
RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "skill", "strict": True, "schema": SkillSchema.model_json_schema()},
}


class EndpointSummariser:
    """Asks a language model behind an endpoint for each skill.

    Args:
        options: the recipe's section ``summariser``, with a model's name.
        counts: here it counts ``calls`` (requests made), ``retries``, ``tokens_in``, ``tokens_out``, ``condensed``
            (episodes) and ``calls_without_usage`` (answered without a count of tokens: a token is then taken to be four
            characters). The budgets are of these counts, so they hold across restarts if the counts do.

    Raises:
        UserError: if the package openai or the key is missing.
    """

    def __init__(self, options: SummariserSection, prompt: SummaryPrompt, counts: Counter[str]) -> None:
        check_access(options)
        self._options, self._prompt, self._counts = options, prompt, counts
        self._address = options.base_url or OPENAI
        self._key = _key(options)
        self._client = _client(self._address, self._key)
        self._pace = _Pace(options.requests_per_minute)
        self._takes_schema = True
        self._random = random.Random()  # for the rests only: nothing of a run depends on it

    async def summarise(self, trajectory: Trajectory) -> Skill:
        self._check_budget()
        text, condensed = self._prompt.render(trajectory)
        if condensed:
            self._counts["condensed"] += 1
        answer, cut = await self._ask(text)
        return parse_skill(answer, cut=cut)

    async def _ask(self, text: str) -> tuple[str, bool]:
        """The model's answer, and whether it was cut short; asked for again as often as the recipe says."""
        schema, tries = self._takes_schema, 0
        while True:
            await self._pace.turn()
            self._check_budget()
            try:
                answer = await self._request(text, schema)
            except _FailedError as failure:
                if schema and failure.status in (400, 422):  # what it refuses may be the schema
                    schema = False
                    continue
                rest = failure.rest or self._backoff(tries)
                if not failure.may_pass or tries == self._options.max_retries or rest > LONGEST_REST:
                    raise SummaryError(failure.reason, self._explain(failure)) from None
                if failure.rest:
                    self._pace.pause(rest)  # the server means everyone
                tries += 1
                self._counts["retries"] += 1
                await asyncio.sleep(rest)
            else:
                if self._takes_schema and not schema:
                    self._takes_schema = False
                    log.warning("%s takes no JSON schema: it is asked without from now on", self._address)
                return answer

    async def _request(self, text: str, schema: bool) -> tuple[str, bool]:
        """One request. Raises _FailedError, without the client's own exception: that one knows the key."""
        import openai

        options = self._options
        body: dict[str, Any] = {"model": options.model, "messages": [{"role": "user", "content": text}]}
        # OpenAI's newer models refuse the old name, many other servers do not know the new one.
        body["max_tokens" if options.base_url else "max_completion_tokens"] = options.max_output_tokens
        if options.temperature is not None:
            body["temperature"] = options.temperature
        if schema:
            body["response_format"] = RESPONSE_FORMAT
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
                may_pass=_may_pass(error.status_code) and error.code != "insufficient_quota",
            ) from None
        except openai.APIConnectionError as error:
            raise _FailedError("connection", self._without_key(f"{error} {error.__cause__ or ''}")) from None
        except (openai.APIError, ValueError) as error:
            raise _FailedError("response", self._without_key(f"no completion: {error}")[:300]) from None
        return self._read(answer, text)

    def _read(self, answer: Any, asked: str) -> tuple[str, bool]:
        """The text of a completion, and whether it was cut short. The client does not check what a server sends."""
        try:
            choice = answer.choices[0]
            said = choice.message.content or ""
            if not isinstance(said, str):
                raise TypeError
        except (AttributeError, IndexError, TypeError):
            given = self._without_key(repr(answer))[:300]
            raise _FailedError("response", f"the answer is no chat completion: {given}") from None
        used: list[Any] = [getattr(answer.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        if not all(isinstance(tokens, int) and tokens >= 0 for tokens in used):
            self._counts["calls_without_usage"] += 1
            used = [math.ceil(len(part) / 4) for part in (asked, said)]
        self._counts["tokens_in"] += used[0]
        self._counts["tokens_out"] += used[1]
        return self._without_key(said), choice.finish_reason == "length"

    def _check_budget(self) -> None:
        options = self._options
        tokens = self._counts["tokens_in"] + self._counts["tokens_out"]
        for key, spent in (("budget_calls", self._counts["calls"]), ("budget_tokens", tokens)):
            budget = getattr(options, key)
            if budget is not None and spent >= budget:
                raise SummaryError("skipped_budget", f"summariser.{key} is {budget}, and {spent} are spent")

    def _backoff(self, tries: int) -> float:
        longest: float = min(LONGEST_REST, BACKOFF_SECONDS * 2**tries)
        return longest * self._random.uniform(0.5, 1.0)

    def _explain(self, failure: _FailedError) -> str:
        """What is wrong, and what to do about it."""
        about = ""
        if failure.status in (401, 403):
            name = _key_name(self._options)
            about = f"it refuses the key of ${name}" if name else "it wants a key: name one in summariser.api_key_env"
        elif failure.status == 404:
            about = (
                f"it knows no model {self._options.model!r} (summariser.model), or the address is wrong "
                "(summariser.base_url; as a rule it ends in /v1)"
            )
        return f"{self._address}: {about and about + '. It says: '}{failure}"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _FailedError(Exception):
    """A request that came to nothing.

    Attributes:
        status: of the HTTP answer, if there was one.
        rest: seconds that the server wants to be left alone, if it says so.
        may_pass: asking again may help.
    """

    def __init__(
        self, what: str, message: str, *, status: int | None = None, rest: float | None = None, may_pass: bool = True
    ) -> None:
        super().__init__(message)
        self.reason = f"failed_{what}"
        self.status, self.rest, self.may_pass = status, rest, may_pass


def _may_pass(status: int) -> bool:
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


def _key_name(options: SummariserSection) -> str | None:
    """The environment variable of the key. OpenAI's own key goes to no other address unless the recipe says so."""
    return options.api_key_env or (None if options.base_url else OPENAI_KEY)


def _key(options: SummariserSection) -> str | None:
    name = _key_name(options)
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {name!r} holds no key for the summariser at {options.base_url or OPENAI}: set "
            "it or name another one in summariser.api_key_env. (For a local server that needs no key: give "
            "summariser.base_url and leave summariser.api_key_env out.)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"what the environment variable {name!r} holds is no key: there are blanks or other odd characters in it"
        )
    return key


def check_access(options: SummariserSection) -> None:
    """Raise UserError if the key or the package openai is missing: to be told before a model is loaded."""
    _key(options)
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError("skills.summariser 'openai' needs the package openai: pip install 'skillsd[openai]'") from error


def _client(address: str, key: str | None) -> Any:
    import openai

    return openai.AsyncOpenAI(
        api_key=key or "none",
        base_url=address,
        # Deadlines and retries are ours, so that every request is counted, paced and within the budget.
        timeout=None,
        max_retries=0,
        # Nothing stays open between requests: an event loop may end at any time, and there is nobody to close it.
        default_headers={"Connection": "close"},
    )
