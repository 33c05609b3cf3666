"""Answers and errors in the forms in which servers send them."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint, Reply
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skillsd.engines import endpoint
from skillsd.engines.endpoint import Endpoint, EndpointError
from skillsd.engines.endpoint_answers import Answer, retry_delay
from skillsd.engines.endpoint_options import EndpointOptions
from skillsd.types import Message

NAMES = {"model": "--model", "base_url": "--endpoint", "api_key_env": "--key-env"}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoint, "BACKOFF_SECONDS", 0.001)
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


def ask(*replies: Reply) -> tuple[Answer | str, Counter[str]]:
    """The answer, or the reason of failure; and the counts."""
    server, counts = FakeEndpoint(*replies), Counter[str]()
    one = Endpoint(EndpointOptions(model="m", base_url=server.url, max_retries=2), counts, NAMES)
    try:
        return asyncio.run(one.ask([Message("user", "x" * 40)], max_tokens=9)), counts
    except EndpointError as error:
        return ("too long" if error.too_long else error.reason), counts
    finally:
        server.close()


def message(content: Any = None, *, finish: Any = "stop", tokens: int | None = 5, **fields: Any) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **fields}, "finish_reason": finish}
    body: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "choices": [choice]}
    if tokens is not None:
        body["usage"] = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
    return Reply(body)


def text(*words: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": word} for word in words]


THINKING = {"type": "thinking", "thinking": text("Down would be wrong.")}
CALL = {"id": "1", "type": "function", "function": {"name": "move", "arguments": '{"to": "Up"}'}}

ANSWERS: dict[str, tuple[Reply, str, str]] = {  # name -> (reply, the text, what is counted)
    "text": (message("Up"), "Up", ""),
    "a list of parts": (message(text("Up", " and left")), "Up and left", ""),
    "one part": (message(text("Up")), "Up", ""),
    "thinking and text (Mistral)": (message([THINKING, *text("Up")]), "Up", ""),
    "strings": (message(["Up", " and left"]), "Up and left", ""),
    "no parts": (message([]), "", "answers_empty"),
    "a refusal": (message(None, refusal="I can't help with that."), "I can't help with that.", "answers_refused"),
    "a refusal as a part": (message([{"type": "refusal", "refusal": "No."}]), "No.", ""),
    "a refusal beside text": (message("Up", refusal="No."), "Up", "answers_refused"),
    "filtered": (message("", finish="content_filter"), "", "answers_refused"),
    "filtered half-way": (message("U", finish="content_filter"), "U", "answers_refused"),
    "thinking only": (message(None, reasoning_content="Up or down?"), "", "answers_empty"),
    "thinking only (OpenRouter)": (message("", reasoning="Up or down?", tokens=None), "", "answers_empty"),
    "the end at once": (message("", tokens=1), "", "answers_empty"),
    "all tokens thought": (message(None, reasoning_content="Up or", finish="length"), "", ""),
    "tool calls": (message(None, tool_calls=[CALL], finish="tool_calls"), "", "answers_tool_calls"),
    "tool calls beside text": (message("Up", tool_calls=[CALL], finish="tool_calls"), "Up", "answers_tool_calls"),
    "no reason for the end": (message("Up", finish=None), "Up", ""),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_the_model_produced_is_its_answer(name: str) -> None:
    reply, said, counted = ANSWERS[name]
    answer, counts = ask(reply)
    assert isinstance(answer, Answer), answer
    assert answer.text == said
    assert counts["calls"] == 1
    assert {name for name in counts if name.startswith("answers")} == ({counted} if counted else set())


LOST: dict[str, Reply] = {
    "nothing": message("", tokens=0),
    "null": message(None, tokens=0),
    "nothing, uncounted": message("", tokens=None),
    "a failed generation": message("", finish="error"),
    "an error in the choice": Reply(
        {"choices": [{"message": {"content": ""}, "error": {"code": 502, "message": "x"}}]}
    ),
    "an error with status 200": Reply({"error": {"message": "Provider returned error", "code": 502}}),
    "an error without a number": Reply({"error": "busy"}),
}


@pytest.mark.parametrize("name", LOST)
def test_what_the_server_lost_is_asked_again(name: str) -> None:
    answer, counts = ask(LOST[name], message("Up"))
    assert isinstance(answer, Answer)
    assert (answer.text, counts["calls"], counts["retries"]) == ("Up", 2, 1)
    reason, counts = ask(LOST[name])
    assert isinstance(reason, str)
    assert reason.startswith("failed_")
    assert counts["calls"] == 3


@pytest.mark.parametrize(
    "reply",
    [
        message("", finish="length", tokens=0),  # LMDeploy
        message(None, finish="model_context_window_exceeded"),  # z.ai
        Reply({"error": {"message": "", "code": "context_length_exceeded"}}, 400),
        Reply({"error": {"message": "", "code": "context_length_exceeded", "type": "x"}}, 500),
        Reply({"error": {"message": "", "type": "exceed_context_size_error"}}, 400),
        Reply(b"", 413),
    ],
)
def test_a_machine_readable_sign_of_too_long_a_dialogue(reply: Reply) -> None:
    assert ask(reply) == ("too long", Counter(calls=1))


@pytest.mark.parametrize("body", [{"code": 429}, {"code": 401}, {"code": 404}])
def test_an_error_with_status_200_has_its_own_status(body: dict[str, int]) -> None:
    reason, counts = ask(Reply({"error": {"message": "no", **body}}))
    assert reason == f"failed_http_{body['code']}"
    assert counts["calls"] == (3 if body["code"] == 429 else 1)


def test_tool_calls_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    server, counts = FakeEndpoint(message(None, tool_calls=[CALL])), Counter[str]()
    one = Endpoint(EndpointOptions(model="m", base_url=server.url), counts, NAMES)

    async def main() -> None:
        for _ in range(3):
            await one.ask([Message("user", "x")], max_tokens=9)

    caplog.set_level(logging.WARNING)
    asyncio.run(main())
    server.close()
    assert caplog.text.count("without a parser of tool calls") == 1
    assert counts["answers_tool_calls"] == 3


@pytest.mark.parametrize("usage", [(0, 5), (0, 0), (10, -1)])
def test_a_count_of_no_tokens_is_no_count(usage: tuple[int, int]) -> None:
    """Otherwise a server that always reports 0 would never spend a budget."""
    reply = message("Up we go")
    reply.body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    _, counts = ask(reply)
    assert (counts["tokens_in"], counts["tokens_out"], counts["calls_without_usage"]) == (10, 2, 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 600) | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "error", "code", "type", "text", "usage", "prompt_tokens",
                         "completion_tokens", "finish_reason", "refusal", "tool_calls", "reasoning"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
well_formed = st.builds(
    lambda content, finish, usage, extra: {
        "choices": [{"message": {"content": content, **extra}, "finish_reason": finish}], "usage": usage,
    },
    json_values, json_values, json_values, st.dictionaries(st.sampled_from(["refusal", "tool_calls"]), json_values),
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(json_values, well_formed), st.sampled_from([200, 200, 200, 400, 413, 422, 429, 500]))
def test_any_answer_is_an_answer_or_an_endpoint_error(body: Any, status: int) -> None:
    answer, _ = ask(Reply(body, status))
    if isinstance(answer, Answer):
        assert isinstance(answer.text, str)
        assert answer.tokens_in >= 0
        assert answer.tokens_out >= 0


# -- Retry-After ----------------------------------------------------------------------------------------------------


def at(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


def test_retry_after_as_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all of HTTP's formats, and in GMT whatever the zone of this machine."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    then = at(30)
    try:
        for date in (
            email.utils.format_datetime(then, usegmt=True),
            email.utils.format_datetime(then.replace(tzinfo=None)),  # ends in -0000
            then.strftime("%A, %d-%b-%y %H:%M:%S GMT"),  # RFC 850
            then.strftime("%a %b %d %H:%M:%S %Y"),  # asctime
            email.utils.format_datetime(then.astimezone(datetime.timezone(datetime.timedelta(hours=5)))),
        ):
            assert retry_delay({"retry-after": date}) == pytest.approx(30, abs=2), date
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "1e18"}, 1e18),
        ({"retry-after": "1e999"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0),
        ({"retry-after": "Sun, 06 Nov 99999 08:49:37 GMT"}, None),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 +9999"}, None),
        ({"retry-after": "Sun, 31 Feb 2094 08:49:37 GMT"}, None),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "1"}, 1),
    ],
)
def test_retry_after(headers: dict[str, str], expected: float | None) -> None:
    assert retry_delay(headers) == expected
