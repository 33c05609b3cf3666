"""What servers of OpenAI's chat completions API answer: texts, errors and delays, in all the forms that are in use."""

from __future__ import annotations

import datetime
import email.utils
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

Messages = list[dict[str, str]]


class Answer(NamedTuple):
    """A completion: its text, whether it was cut off, and its token counts (estimated if the server gives none)."""

    text: str
    cut: bool
    tokens_in: int
    tokens_out: int


class RequestError(Exception):
    """One request that failed.

    Attributes:
        reason: ``failed_`` and one of ``http_429`` (any status), ``timeout``, ``connection``, ``response``, ``empty``.
        status: of the HTTP response, if it is an error.
        delay: seconds to wait before the next request, if the server gave them.
        transient: a retry may help.
        too_long: the server states in a machine-readable field that the request does not fit into the context.
    """

    def __init__(
        self,
        what: str,
        message: str,
        *,
        status: int | None = None,
        delay: float | None = None,
        transient: bool = True,
        too_long: bool = False,
    ) -> None:
        super().__init__(message)
        self.reason = f"failed_{what}"
        self.status, self.delay, self.transient, self.too_long = status, delay, transient, too_long


def http_error(status: int, message: str, error: Any, headers: Mapping[str, str]) -> RequestError:
    """The failure behind an HTTP status, or behind the same number in an answer's field ``error``.

    Args:
        error: the body's ``error``, if it has one.
    """
    fields = error if isinstance(error, Mapping) else {}
    code, kind = (str(fields.get(name) or "") for name in ("code", "type"))
    # There is no common code: context_length_exceeded (OpenAI, Groq, Cerebras), exceed_context_size_error (llama.cpp),
    # model_context_window_exceeded (z.ai) ... A 413 refuses the size of the request itself.
    too_long = status == 413 or (status in (400, 422, 500) and "context" in f"{code} {kind}".lower())
    return RequestError(
        f"http_{status}",
        message,
        status=status,
        delay=retry_delay(headers),
        # OpenAI also answers 429 if the account has no credit left.
        transient=not too_long
        and (status in (408, 409, 429) or status >= 500)
        and "insufficient_quota" not in (code, kind),
        too_long=too_long,
    )


def read_answer(answer: Any, messages: Messages) -> tuple[Answer, list[str]]:
    """The text and token counts of a chat completion, which the client does not validate.

    Whatever the model produced is its answer, even if it is a refusal, or empty after some thinking: replaying it until
    it is better would change what is measured. An answer that the server lost, without any tokens, is a failure.

    Returns:
        The answer, and the counts to increase by 1: ``calls_without_usage``, ``answers_refused``, ``answers_empty``,
        ``answers_tool_calls``.

    Raises:
        RequestError: if it is not a chat completion, or an error, or empty without any tokens.
    """
    choice = None
    try:
        if fault := getattr(answer, "error", None) or getattr(answer.choices[0], "error", None):
            raise _error_in(fault)
        choice = answer.choices[0]
        message, end = choice.message, str(getattr(choice, "finish_reason", None) or "")
        said = _text(message.content)
        refusal = getattr(message, "refusal", None)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise RequestError("response", f"the answer is not a chat completion: {answer!r}") from None
    text = said if said.strip() or not isinstance(refusal, str) else refusal
    used, tallies = _usage(answer), list[str]()
    generated = used[1] if used else None
    cut = end in ("length", "max_tokens") or "context" in end  # "model_context_window_exceeded" (z.ai)
    if refusal or end == "content_filter":
        tallies.append("answers_refused")
    elif getattr(message, "tool_calls", None):
        tallies.append("answers_tool_calls")
    elif not text.strip() and ("context" in end or (cut and generated == 0)):
        # No room for a single token (LMDeploy, some proxies): not an error for them.
        raise RequestError("response", f"empty, finish_reason {end!r}", transient=False, too_long=True)
    elif not text.strip() and not cut:
        thought = any(getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
        if end == "error" or not (generated or thought):
            raise RequestError("empty", f"an empty answer, finish_reason {end or None!r}")
        tallies.append("answers_empty")
    if used is None:
        tallies.append("calls_without_usage")
        sizes = (sum(len(part["content"]) for part in messages), len(text))
        used = (math.ceil(sizes[0] / 4), math.ceil(sizes[1] / 4))
    return Answer(text, cut, *used), tallies


def _error_in(fault: Any) -> RequestError:
    """An error that came with status 200 (OpenRouter), whose code is often the status."""
    fields = fault if isinstance(fault, Mapping) else {"message": fault}
    status, text = fields.get("code"), str(fields.get("message") or fault)
    if isinstance(status, int) and 400 <= status < 600:
        return http_error(status, text, fields, {})
    return RequestError("response", text)


def _text(content: Any) -> str:
    """The text of a message's content: a string, nothing, or a list of parts. Thinking is not part of it."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError
    return "".join(map(_part, content))


_PARTS = {"text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a part -> its field with words of the answer. Other parts are thinking (Mistral, Anthropic) or no text."""


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    field = _PARTS.get(part.get("type", "text"))
    text = part[field] if field else ""
    if not isinstance(text, str):
        raise TypeError
    return text


def _usage(answer: Any) -> tuple[int, int] | None:
    """Tokens in and out. No prompt is empty, so 0 is no count."""
    usage = getattr(answer, "usage", None)
    given = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(tokens, int) and tokens >= 0 for tokens in given) or not given[0]:
        return None
    return given[0], given[1]  # type: ignore[return-value]


def retry_delay(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, 0 or more; None without a usable one.

    It holds seconds or a date, which may be in one of HTTP's two obsolete formats (RFC 9110, 5.6.7) and is in GMT
    whatever its zone is: also with ``-0000`` or none.
    """
    given = headers.get("retry-after")
    delay: float | None = None
    if milliseconds := headers.get("retry-after-ms"):  # OpenAI and Azure
        delay = _number(milliseconds, 1000)
    if delay is None and given is not None:
        delay = _number(given)
        if delay is None:
            try:
                date = email.utils.parsedate_to_datetime(given)
                delay = date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                return None
    return None if delay is None else max(0.0, delay)


def _number(text: str, divisor: float = 1.0) -> float | None:
    try:
        value = float(text) / divisor
    except ValueError:
        return None
    return value if math.isfinite(value) else None
