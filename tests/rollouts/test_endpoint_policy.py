"""A model behind a foreign server: how a dialogue that is too long is recognised, and what else is not mistaken for it.

The bodies are those of public servers, from their issue trackers and from clients that list them, as far as known; the
numbers are made to fit.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint, Reply, Request, completion, refusal

from skillsd.engines import endpoint
from skillsd.engines.endpoint import Endpoint
from skillsd.engines.endpoint_options import EndpointOptions
from skillsd.errors import UserError
from skillsd.rollouts.endpoint_policy import EndpointPolicy, shortened
from skillsd.rollouts.policy import Budget, PolicyFailedError
from skillsd.types import Message

LIMIT = 2000
"""Characters that the fake server takes, prompt and answer."""
FIRST = Message("user", "the rules of the game. " * 20)
NAMES = {"model": "--model", "base_url": "--endpoint", "api_key_env": "--key-env"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


Play = Callable[..., tuple["Result", FakeEndpoint]]
Result = list[str] | Exception


@pytest.fixture
def play() -> Iterator[Play]:
    """`play(answer, observations)`: the actions of one episode, None at its end if the dialogue became too long."""
    servers: list[FakeEndpoint] = []

    def run(answer: Callable[[Request], Reply], observations: list[str], first: Message = FIRST) -> Any:
        server = FakeEndpoint(answer=answer)
        servers.append(server)
        options = EndpointOptions(model="m", base_url=server.url, max_retries=1)
        policy = EndpointPolicy(Endpoint(options, Counter(), NAMES))

        async def main() -> list[str | None]:
            episode = policy.begin((first,), Budget(99, 100, 10**6), seed=0, session="s")
            actions: list[str | None] = []
            for turn, observation in enumerate(observations):
                actions.append(await episode.act(turn))
                if actions[-1] is None:
                    break
                episode.observe(observation)
            return actions

        try:
            return asyncio.run(main()), server
        except (UserError, PolicyFailedError) as error:
            return error, server

    yield run
    for server in servers:
        server.close()


def size(request: Request) -> int:
    return sum(len(message["content"]) for message in request.body["messages"])


def openai_error(message: str, code: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": "messages", "code": code}}


TOO_LONG: dict[str, tuple[int, Any]] = {
    "OpenAI": (400, openai_error("This model's maximum context length is 128000 tokens. However, your messages "
                                 "resulted in 129034 tokens. Please reduce the length.", "context_length_exceeded")),
    "OpenAI, responses": (400, openai_error("Your input exceeds the context window of this model. Please adjust it.",
                                            "context_length_exceeded")),
    "Azure, string": (400, openai_error("Invalid 'messages[1].content': string too long.", "string_above_max_length")),
    "vLLM before 0.9": (400, {"object": "error", "message": "This model's maximum context length is 4096 tokens. "
                              "However, you requested 4117 tokens (3605 in the messages, 512 in the completion).",
                              "type": "BadRequestError", "param": None, "code": 400}),
    "vLLM": (400, openai_error("'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum "
                               "context length is 4096 tokens and your request has 3605 input tokens", None)),
    "vLLM, prompt": (400, openai_error("The decoder prompt (length 4313) is longer than the maximum model length of "
                                       "4096.", None, "BadRequestError")),
    "vLLM, negative": (400, openai_error("max_tokens must be at least 1, got -217.", None, "BadRequestError")),
    "llama.cpp": (400, {"error": {"code": 400, "message": "request (5009 tokens) exceeds the available context size "
                                  "(4096 tokens), try increasing it", "type": "exceed_context_size_error",
                                  "n_prompt_tokens": 5009, "n_ctx": 4096}}),
    "llama.cpp, old": (500, {"error": {"code": 500, "message": "context shift is disabled", "type": "server_error"}}),
    "Ollama": (400, openai_error("prompt too long; exceeded max context length by 4 tokens", None, "api_error")),
    "Ollama, old": (500, openai_error("llama runner process has terminated: exit status 2", None, "api_error")),
    "LM Studio": (400, {"error": "Trying to keep the first 5210 tokens when context the overflows. However, the model "
                        "is loaded with context length of only 4096 tokens, which is not enough."}),
    "TGI": (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 "
                  "`inputs` tokens and 512 `max_new_tokens`", "error_type": "validation"}),
    "TGI, inputs": (422, {"error": "Input validation error: `inputs` must have less than 4095 tokens. Given: 5012",
                          "error_type": "validation"}),
    "SGLang": (400, {"object": "error", "message": "The input (5012 tokens) is longer than the model's context length "
                     "(4096 tokens).", "type": "BadRequestError", "param": None, "code": 400}),
    "SGLang, total": (400, {"object": "error", "message": "Requested token count exceeds the model's maximum context "
                            "length of 4096 tokens.", "type": "Bad Request", "param": None, "code": 400}),
    "TensorRT-LLM": (400, openai_error("default_max_tokens (-904) should be greater than 0", None, "BadRequestError")),
    "OpenRouter": (400, {"error": {"message": "This endpoint's maximum context length is 131072 tokens. However, you "
                                   "requested about 140912 tokens. Please reduce the length of either one, or use the "
                                   '"middle-out" transform.', "code": 400}}),
    "OpenRouter, with 200": (200, {"error": {"message": "Input length 300000 exceeds the maximum allowed input length",
                                             "code": 400}}),
    "Anthropic": (400, {"type": "error", "error": {"type": "invalid_request_error",
                        "message": "prompt is too long: 213462 tokens > 200000 maximum"}}),
    "Anthropic, sum": (400, openai_error("input length and `max_tokens` exceed context limit: 188240 + 21333 > 20")),
    "Anthropic, bytes": (413, {"type": "error", "error": {"type": "request_too_large", "message": "Request exceeds the "
                                                          "maximum size"}}),
    "Bedrock": (400, {"message": "Input is too long for requested model."}),
    "Gemini": (400, [{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "The input token count (1196265) "
                                "exceeds the maximum number of tokens allowed (1048575)."}}]),
    "Mistral": (400, {"object": "error", "message": "Prompt contains 40000 tokens and 0 draft tokens, too large for "
                      "model with 32768 maximum context length", "type": "invalid_request_error", "code": "3051"}),
    "Mistral, no body": (400, b""),
    "Cerebras": (413, b""),
    "Groq": (400, openai_error("Please reduce the length of the messages or completion.", "context_length_exceeded")),
    "Groq, a minute's tokens": (413, openai_error("Request too large for model, Limit 6000, Requested 7041",
                                                  "rate_limit_exceeded", "tokens")),
    "xAI": (400, {"code": "Client specified an invalid argument", "error": "This model's maximum prompt length is "
                  "131072 but the request contains 537812 tokens."}),
    "Together": (422, openai_error("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8193.")),
    "Fireworks": (400, openai_error("The prompt is too long: 10034, model maximum context length: 8191")),
    "Kimi": (400, openai_error("Invalid request: Your request exceeded model token limit: 8192 (requested: 9001)")),
    "DashScope": (400, openai_error("Range of input length should be [1, 30720]", "invalid_parameter_error")),
    "MiniMax": (400, openai_error("invalid params, context window exceeds limit (2013)", None, "bad_request_error")),
    "Zhipu": (400, {"error": {"code": "1261", "message": "Prompt exceeds max length"}}),
    "Copilot": (400, openai_error("prompt token count of 135000 exceeds the limit of 128000",
                                  "model_max_prompt_tokens_exceeded")),
    "Cohere": (400, {"message": "too many tokens: size limit exceeded by 1201 tokens. Try using shorter inputs"}),
    "in Chinese": (400, openai_error("输入长度超过模型上限", "1214")),
    "a proxy": (413, b"<html><h1>413 Request Entity Too Large</h1></html>"),
    "a proxy, without words": (400, b"<html><h1>400 Bad Request</h1></html>"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_dialogue_that_became_too_long(play: Play, name: str) -> None:
    """It ends the episode, in whatever words the server puts it, for at most two requests more."""
    status, body = TOO_LONG[name]
    result, server = play(
        lambda request: completion("Up") if size(request) <= LIMIT else Reply(body, status), ["a room. " * 60] * 20
    )
    assert result == ["Up"] * 4 + [None]
    refused_more_than_once = status == 500  # retried, and asked again to exclude a passing fault
    assert len(server.requests) <= 4 + 2 + (3 if refused_more_than_once else 0)


@pytest.mark.parametrize("name", ["vLLM", "TGI", "llama.cpp", "Gemini", "Mistral, no body"])
@pytest.mark.parametrize("words", [50, 100, 20_000])
def test_a_single_text_that_is_too_long(play: Play, name: str, words: int) -> None:
    status, body = TOO_LONG[name]

    def answer(request: Request) -> Reply:
        return completion("Up") if size(request) <= LIMIT else Reply(body, status)

    observation = "and a long list, " * words
    result, _ = play(answer, ["short", observation, "short"])
    assert result == (["Up", "Up", None] if words > 50 else ["Up"] * 3)


def test_a_first_prompt_that_is_too_long(play: Play) -> None:
    status, body = TOO_LONG["vLLM"]
    long = Message("user", "the rules of the game. " * 300)
    result, server = play(
        lambda request: completion("Up") if size(request) <= LIMIT else Reply(body, status), ["a room"], long
    )
    assert result == [None]
    assert len(server.requests) == 2


def test_first_prompts_that_are_all_too_long_end_the_evaluation() -> None:
    server = FakeEndpoint(answer=lambda request: refusal(400, "too much", code="context_length_exceeded"))
    policy = EndpointPolicy(Endpoint(EndpointOptions(model="m", base_url=server.url), Counter(), NAMES))

    async def main() -> None:
        for _ in range(7):
            assert await policy.ask([FIRST], 10) is None
        with pytest.raises(UserError, match=r"the first 8 prompts are too long for the model.*too much"):
            await policy.ask([FIRST], 10)

    asyncio.run(main())
    server.close()


BAD = "a word that it refuses"

OTHER_REFUSALS: dict[str, tuple[int, Any]] = {
    "Azure's filter": (400, openai_error("The response was filtered due to the prompt triggering Azure's content "
                                         "management policy.", "content_filter")),
    "a special token": (400, openai_error("Encountered text corresponding to disallowed special token")),
    "validation": (422, {"error": "Input validation error", "error_type": "validation"}),
    "template": (500, {"error": {"code": 500, "message": "Jinja Exception", "type": "server_error"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_REFUSALS)
@pytest.mark.parametrize("turns", [0, 3])
def test_a_refused_text_is_not_taken_for_a_long_one(play: Play, name: str, turns: int) -> None:
    """Such an episode is played again, and does not count as one that ran out of tokens."""
    status, body = OTHER_REFUSALS[name]

    def answer(request: Request) -> Reply:
        return Reply(body, status) if BAD in request.body["messages"][-1]["content"] else completion("Up")

    result, _ = play(answer, [*["a room. " * 60] * turns, BAD, "not reached"])
    assert isinstance(result, PolicyFailedError)


def test_a_refused_form_is_not_taken_for_a_long_text(play: Play) -> None:
    """A server that takes no assistant messages, for example."""

    def answer(request: Request) -> Reply:
        return refusal(400, "roles!") if len(request.body["messages"]) > 1 else completion("Up")

    assert isinstance(play(answer, ["a room. " * 60] * 3)[0], PolicyFailedError)


def test_a_server_that_recovers_did_not_get_too_long_a_dialogue(play: Play) -> None:
    seen: list[int] = []

    def answer(request: Request) -> Reply:
        seen.append(size(request))
        return refusal(500, "oops") if seen.count(size(request)) <= 2 and len(seen) > 1 and size(request) > 900 else (
            completion("Up"))  # fmt: skip

    result, server = play(answer, ["a room. " * 60] * 5)
    assert isinstance(result, PolicyFailedError)
    assert len(server.requests) == 1 + 2 + 1 + 1  # and its dialogue, which failed twice, passed in the end


def test_the_request_after_an_empty_answer_has_no_empty_message(play: Play) -> None:
    """Anthropic's and Mistral's servers refuse them, for the rest of the episode."""

    def answer(request: Request) -> Reply:
        empty = any(not message["content"].strip() for message in request.body["messages"])
        return refusal(400, "text content blocks must be non-empty") if empty else completion("  \n")

    assert play(answer, ["a room"] * 3)[0] == ["", "", ""]


def test_a_server_that_drops_the_beginning_is_reported_once(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    def answer(request: Request) -> Reply:
        tokens = size(request) // 4
        return completion("Up", usage=(tokens if tokens < 300 else 150, 1))

    caplog.set_level(logging.WARNING)
    assert play(answer, ["a room. " * 60] * 8)[0] == ["Up"] * 8
    assert caplog.text.count("OLLAMA_CONTEXT_LENGTH") == 1


def test_shortened_messages_keep_their_form_and_the_newest_text() -> None:
    messages = [Message("system", "s" * 500), Message("user", "u" * 500), Message("assistant", "Up"),
                Message("user", "new" * 20)]  # fmt: skip
    short = shortened(messages, 300)
    assert [message.role for message in short] == [message.role for message in messages]
    assert short[-1] == messages[-1]
    assert 250 <= sum(len(message.content) for message in short) <= 305
    assert all(message.content for message in shortened(messages, 1))
