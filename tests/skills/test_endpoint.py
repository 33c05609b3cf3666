"""The summariser behind an endpoint, against a server that misbehaves."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_endpoint import SKILL, FakeEndpoint, Reply, completion, refusal

from skillsd.config import SummariserSection
from skillsd.engines import endpoint
from skillsd.errors import UserError
from skillsd.skills.background import BackgroundSummaries
from skillsd.skills.bank import Bank
from skillsd.skills.endpoint_summariser import NAMES, EndpointSummariser
from skillsd.skills.summarise import SummaryError
from skillsd.skills.summary_prompt import SummaryPrompt, load_prompt
from skillsd.types import Message, Skill, Trajectory

KEY = "sk-very-secret-0123456789"
GOOD = completion(SKILL)
Serve = Callable[..., FakeEndpoint]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """The client's first request imports a lot, which would count against its deadline."""
    server = FakeEndpoint(GOOD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        one = endpoint.Endpoint(SummariserSection(model="m", base_url=server.url), Counter(), NAMES)
        asyncio.run(one.ask([Message("user", "x")], max_tokens=1))
    server.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[FakeEndpoint] = []

    def make(*replies: Reply, **options: Any) -> FakeEndpoint:
        servers.append(FakeEndpoint(*replies, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def summariser(server: FakeEndpoint, counts: Counter[str] | None = None, **options: Any) -> EndpointSummariser:
    section = SummariserSection(
        **{
            "model": "a-model",
            "base_url": server.url,
            "api_key_env": "MY_KEY",
            "timeout_seconds": 20.0,
            "max_retries": 2,
            **options,
        }
    )
    prompt = SummaryPrompt(load_prompt("summarise"), max_chars=1000, max_input_chars=section.max_input_chars)
    return EndpointSummariser(section, prompt, Counter() if counts is None else counts)


def outcome(server: FakeEndpoint, trajectory: Trajectory, **options: Any) -> tuple[str, Counter[str]]:
    """``ok`` or the reason for having no skill, and the counts."""
    counts: Counter[str] = Counter()
    try:
        skill = asyncio.run(summariser(server, counts, **options).summarise(trajectory))
    except SummaryError as error:
        return error.reason, counts
    assert skill == Skill(**SKILL)
    return "ok", counts


def test_request(serve: Serve, trajectory: Trajectory) -> None:
    server = serve(GOOD)
    result, counts = outcome(server, trajectory, temperature=0.5, request={"seed": 3, "reasoning_effort": "low"})
    assert result == "ok"
    assert counts == {"calls": 1, "tokens_in": 100, "tokens_out": 20}
    [request] = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    text = request.text
    assert "blue door" in text
    assert request.body.pop("messages") == [{"role": "user", "content": text}]
    form = request.body.pop("response_format")
    assert form["type"] == "json_schema"
    assert form["json_schema"]["strict"] is True
    assert set(form["json_schema"]["schema"]["properties"]) == set(SKILL)
    assert request.body == {
        "model": "a-model", "max_tokens": 1024, "temperature": 0.5, "seed": 3, "reasoning_effort": "low"
    }  # fmt: skip


LIMIT = refusal(429, "slow down", Retry_After="0.1")
CUT = json.dumps(SKILL)[:60]
FAULTS: dict[str, tuple[list[Reply], str, int]] = {  # name -> (replies, result, requests)
    "429 then ok": ([LIMIT, GOOD], "ok", 2),
    "429 always": ([LIMIT], "failed_http_429", 3),
    "429 of an empty account": ([refusal(429, "no money", code="insufficient_quota")], "failed_http_429", 1),
    "429 till tomorrow": ([refusal(429, "enough for today", Retry_After="86400")], "failed_http_429", 1),
    "429 with an odd header": ([refusal(429, "slow down", Retry_After="soon"), GOOD], "ok", 2),
    "500, 503, then ok": ([refusal(500, "oops"), refusal(503, "busy", Retry_After="0"), GOOD], "ok", 3),
    "500 always": ([refusal(500, "oops")], "failed_http_500", 3),
    "hangs, then ok": ([Reply({}, hang=5), GOOD], "ok", 2),
    "hangs always": ([Reply({}, hang=5)], "failed_timeout", 3),
    "cut off, then ok": ([Reply({"choices": []}, lost=5), GOOD], "ok", 2),
    "cut off always": ([Reply({"choices": []}, lost=5)], "failed_connection", 3),
    "half a JSON body": ([Reply(b'{"choices": [{"mess'), GOOD], "ok", 2),
    "a web page": ([Reply(b"<html>Welcome</html>")], "failed_response", 3),
    "an error with status 200": ([Reply({"error": {"message": "no"}})], "failed_response", 3),
    "no choices": ([Reply({"choices": []})], "failed_response", 3),
    "choices that are no list": ([Reply({"choices": {"a": 1}})], "failed_response", 3),
    "a choice without its end": ([Reply({"choices": [{"message": {"content": json.dumps(SKILL)}}]})], "ok", 1),
    "content that is no text": ([completion([1])], "failed_response", 3),
    "401": ([refusal(401, "who are you?")], "failed_http_401", 1),
    "403": ([refusal(403, "not you")], "failed_http_403", 1),
    "404": ([refusal(404, "no such model")], "failed_http_404", 1),
    "400, with the schema and without": ([refusal(400, "too long")], "failed_http_400", 2),
    "400 for the schema": ([refusal(400, "response_format is not supported"), GOOD], "ok", 2),
    "422 for the schema": ([refusal(422, "extra fields"), GOOD], "ok", 2),
    "truncated JSON": ([completion(CUT)], "rejected_malformed", 1),
    "truncated by the limit of tokens": ([completion(CUT, finish="length")], "rejected_too_long", 1),
    "all tokens spent on thinking": ([completion(None, finish="length")], "rejected_too_long", 1),
    "wrong schema": ([completion({"skill": "go left"})], "rejected_malformed", 1),
    "wrong types": ([completion({**SKILL, "golden_workflow": ["left"]})], "rejected_malformed", 1),
    "empty": ([completion("  ")], "rejected_empty", 1),
    "no content": ([completion(None)], "rejected_empty", 1),
    "prose around": ([completion(f"Sure!\n```json\n{json.dumps(SKILL, indent=1)}\n``` Is that {{ok}}?")], "ok", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(serve: Serve, trajectory: Trajectory, fault: str) -> None:
    replies, expected, calls = FAULTS[fault]
    server = serve(*replies)
    result, counts = outcome(server, trajectory, timeout_seconds=0.4 if "hangs" in fault else 20.0)
    assert (result, len(server.requests)) == (expected, calls)
    assert counts["calls"] == calls
    assert counts["retries"] == (0 if "schema" in fault else calls - 1)


def test_unreachable_server(serve: Serve, trajectory: Trajectory) -> None:
    server = serve(GOOD)
    server.close()
    assert outcome(server, trajectory) == ("failed_connection", {"calls": 3, "retries": 2})


def test_429_pauses_all_requests_for_the_given_time(serve: Serve, trajectory: Trajectory) -> None:
    server = serve(refusal(429, "slow down", Retry_After="0.4"), GOOD)

    async def main() -> None:
        counts: Counter[str] = Counter()
        one = summariser(server, counts)
        first = asyncio.create_task(one.summarise(trajectory))
        while not counts["retries"]:
            await asyncio.sleep(0.01)
        await asyncio.gather(first, one.summarise(trajectory))

    asyncio.run(main())
    times = [request.at - server.requests[0].at for request in server.requests]
    assert len(times) == 3
    assert min(times[1:]) >= 0.4


def test_refused_schema_is_remembered_and_refused_request_is_not(serve: Serve, trajectory: Trajectory) -> None:
    def answer(request: Any) -> Reply:
        if "too long" in request.text:
            return refusal(400, "too long")
        return refusal(400, "what is response_format?") if "response_format" in request.body else GOOD

    server = serve(answer=answer)

    async def main() -> None:
        one = summariser(server)
        with pytest.raises(SummaryError):
            await one.summarise(with_word(trajectory, "too long"))
        assert len(server.requests) == 2
        for _ in range(3):
            await one.summarise(trajectory)
        assert ["response_format" in request.body for request in server.requests[2:]] == [True, False, False, False]

    asyncio.run(main())


def with_word(trajectory: Trajectory, word: str) -> Trajectory:
    return dataclasses.replace(trajectory, prompt=(dataclasses.replace(trajectory.prompt[0], content=word),))


def test_requests_per_minute(serve: Serve, trajectory: Trajectory) -> None:
    server = serve(GOOD)

    async def main() -> None:
        one = summariser(server, requests_per_minute=600)
        await asyncio.gather(*(one.summarise(trajectory) for _ in range(4)))

    begin = time.monotonic()
    asyncio.run(main())
    assert len(server.requests) == 4
    assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize(("budget", "calls"), [({"budget_calls": 2}, 2), ({"budget_tokens": 121}, 2)])
def test_spent_budget_stops_the_calls(
    serve: Serve, trajectory: Trajectory, budget: dict[str, int], calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(GOOD)
    with Bank(":memory:") as bank:

        async def main(before: dict[str, int]) -> dict[str, int]:
            counts: Counter[str] = Counter()
            one = summariser(server, counts, **budget)
            work = BackgroundSummaries(one, bank, max_chars=1000, concurrency=1, timeout=5, counts=counts)
            work.restore_stats(before)
            for _ in range(4):
                work.submit(trajectory, source="s", iteration=0)
            await work.drain()
            work.collect()
            return work.stats()

        stats = asyncio.run(main({}))
        assert (len(server.requests), stats["calls"], stats["skipped_budget"]) == (calls, calls, 4 - calls)
        assert caplog.text.count("are spent") == 1
        again = asyncio.run(main(stats))  # a restart does not reset the budget
        assert (len(server.requests), again["calls"], again["skipped_budget"]) == (calls, calls, 8 - calls)


def test_retries_count_towards_the_budget(serve: Serve, trajectory: Trajectory) -> None:
    server = serve(refusal(500, "oops"))
    assert outcome(server, trajectory, budget_calls=2)[0] == "skipped_budget"
    assert len(server.requests) == 2


@pytest.mark.parametrize("usage", [None, (None, 3), (-1, 3), ("7", 3)])
def test_missing_token_counts_are_estimated(serve: Serve, trajectory: Trajectory, usage: Any) -> None:
    reply = completion(SKILL, usage=None)
    if usage:
        reply.body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    server = serve(reply)
    _, counts = outcome(server, trajectory)
    assert counts["calls_without_usage"] == 1
    assert counts["tokens_in"] == pytest.approx(len(server.requests[0].text) / 4, abs=1)
    assert counts["tokens_out"] == pytest.approx(len(json.dumps(SKILL)) / 4, abs=1)


def test_failure_is_logged_once(serve: Serve, trajectory: Trajectory, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(refusal(401, "Incorrect API key provided"))
    with Bank(":memory:") as bank:

        async def main() -> dict[str, int]:
            work = BackgroundSummaries(summariser(server), bank, max_chars=1000, concurrency=4, timeout=5)
            for _ in range(5):
                work.submit(trajectory, source="s", iteration=0)
            await work.drain()
            return work.stats()

        assert asyncio.run(main()) == {"submitted": 5, "failed_http_401": 5, "pending": 0}
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "refuses the key of $MY_KEY" in warnings[0]
    assert "Incorrect API key provided" in warnings[0]


# -- the key --------------------------------------------------------------------------------------------------------


def test_key_is_never_logged_or_returned(
    serve: Serve, trajectory: Trajectory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the server repeats it, and with debug logging in every library."""
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    leaking = {**SKILL, "golden_workflow": f"Use {KEY}."}
    server = serve(
        refusal(500, f"the key {KEY} is bad"),
        completion(leaking),
        refusal(401, f"the key {KEY} is wrong"),
        Reply({"error": KEY}),
    )

    async def main() -> None:
        one = summariser(server, max_retries=1)
        skill = await one.summarise(trajectory)
        assert skill.golden_workflow == "Use ***."
        for _ in range(2):
            with pytest.raises(SummaryError) as error:
                await one.summarise(trajectory)
            assert KEY not in str(error.value)
            assert error.value.__suppress_context__
            logging.getLogger("test").warning("failed", exc_info=error.value)

    asyncio.run(main())
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert len(caplog.records) > 5
    assert KEY not in caplog.text
    assert KEY not in repr(summariser(server).__dict__.get("_options"))


def test_local_server_gets_no_key(serve: Serve, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(GOOD)
    assert outcome(server, trajectory, api_key_env=None)[0] == "ok"
    assert KEY not in str(server.requests[0].headers)


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        ({}, None, r"'OPENAI_API_KEY' holds no key .*https://api.openai.com/v1"),
        ({"api_key_env": "MISSING", "base_url": "http://localhost:1/v1"}, None, r"'MISSING' holds no key"),
        ({"api_key_env": "ODD"}, "two words", "odd characters"),
        ({"api_key_env": "ODD"}, "sk-\N{EM DASH}", "odd characters"),
    ],
)
def test_missing_or_odd_key_is_refused_before_any_request(
    options: dict[str, str], value: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value:
        monkeypatch.setenv("ODD", value)
    with pytest.raises(UserError, match=message) as error:
        endpoint.check_access(SummariserSection(model="m", **options), NAMES)
    assert not value or value not in str(error.value)


@pytest.mark.parametrize("key", ["gsk_abc123", "hf_AbC"])
def test_key_given_instead_of_its_name_is_not_repeated(key: str) -> None:
    with pytest.raises(UserError, match=r"summariser.api_key_env is not set \(not repeated here") as error:
        endpoint.check_access(SummariserSection(model="m", api_key_env=key), NAMES)
    assert key not in str(error.value)


def test_name_of_an_existing_variable_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("my_key", "")
    with pytest.raises(UserError, match="'my_key' holds no key"):
        endpoint.check_access(SummariserSection(model="m", api_key_env="my_key"), NAMES)


@pytest.mark.parametrize("key", ["EMPTY", "x", "L"])
def test_dummy_key_is_not_redacted_from_answers(
    serve: Serve, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    server = serve(completion({**SKILL, "golden_workflow": "EMPTY the box: Left, then up."}))
    skill = asyncio.run(summariser(server).summarise(trajectory))
    assert skill.golden_workflow == "EMPTY the box: Left, then up."
    assert server.requests[0].headers["authorization"] == f"Bearer {key}"


@pytest.mark.parametrize("proxy", ["nonsense://host:1", "http://host:port"])
def test_error_if_the_client_cannot_be_constructed(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    with pytest.raises(UserError, match=r"'http://some.host/v1' \(summariser.base_url\) can't be asked"):
        endpoint.Endpoint(SummariserSection(model="m", base_url="http://some.host/v1"), Counter(), NAMES)


def test_error_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install openai"):
        endpoint.check_access(SummariserSection(model="m", base_url="http://localhost:1/v1"), NAMES)


def test_openais_own_address_gets_the_usual_key_and_max_completion_tokens(
    trajectory: Trajectory, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(GOOD)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere.invalid/v1")  # only the recipe sets the address
    monkeypatch.setattr(endpoint, "OPENAI", server.url)
    assert outcome(server, trajectory, base_url=None, api_key_env=None)[0] == "ok"
    [request] = server.requests
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body["max_completion_tokens"] == 1024
    assert "max_tokens" not in request.body
