"""Thoughts are no actions, whatever a family's tags are and whoever writes the opening tag: the prompt or the model."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from tokenizers import AddedToken

from skillsd.engines.endpoint import Answer
from skillsd.prompting.renderer import ChatRenderer
from skillsd.prompting.thinking import TAGS, opened_by, without_thinking
from skillsd.rollouts.endpoint_policy import EndpointPolicy
from skillsd.rollouts.policy import Budget
from skillsd.types import Message
from skillsd.warm_start.new_model import make_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(("start", "end"), TAGS.items())
def test_action_is_what_follows_the_thinking(start: str, end: str) -> None:
    assert without_thinking("Up") == "Up"
    assert without_thinking(f"{start}Down?{end}Up") == "Up"
    assert without_thinking(f"{start}Down?{end}Up{start}Left?{end}") == "Up"
    assert without_thinking(f"Down?{end}Up", start) == "Up"
    assert without_thinking(f"Down?{end}Up") == "Up"  # the prompt opened it, in a way that is not known


@pytest.mark.parametrize(("start", "end"), TAGS.items())
def test_unfinished_thought_is_no_action(start: str, end: str) -> None:
    assert without_thinking(f"{start}Down") == ""
    assert without_thinking("Down", start) == ""
    assert without_thinking(f"{start}Down{end}Up{start}Left") == ""


@pytest.mark.parametrize(("start", "end"), TAGS.items())
def test_thought_that_a_prompt_leaves_open(start: str, end: str) -> None:
    assert opened_by(f"user: go\nassistant: {start}\n") == start
    assert opened_by(f"user: go\nassistant: {start}\n\n{end}\n\n") == ""
    assert opened_by("user: go\nassistant: ") == ""


@pytest.mark.parametrize("kind", ["text", "token", "special token"])
@pytest.mark.parametrize("opened", [False, True])
def test_rendered_replies(opened: bool, kind: str) -> None:
    """The tags can be plain text, tokens, or special tokens, which decoding leaves out."""
    tokenizer: Any = make_tokenizer([" user assistant Up Down"] * 3, 400)
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    if kind != "text":
        tokenizer.add_tokens([AddedToken(text, special="special" in kind) for text in ("<think>", "</think>")])
    tokenizer.chat_template = CHATML + (ASKS.replace("assistant\n", "assistant\n<think>\n") if opened else ASKS)
    renderer = ChatRenderer(tokenizer, frozenset({tokenizer.convert_tokens_to_ids("<|im_end|>")}))

    def action(reply: str) -> str:
        return renderer.text(tokenizer.encode(reply, add_special_tokens=False))

    start = "" if opened else "<think>"
    assert action(f"{start}Down?</think>\n\nUp<|im_end|>") == "Up"
    assert action(f"{start}Down?") == ""
    assert action(f"{start}Down?<|im_end|>") == ""
    assert action("Up<|im_end|>") == ("" if opened else "Up")
    # A tag in the first user message opens nothing.
    assert renderer.prompt([Message("user", "<think>")])
    assert action(f"{start}a</think>Up") == "Up"


def test_answers_of_an_endpoint() -> None:
    """A server without a reasoning parser leaves the thinking in the text."""

    class Server:
        async def ask(self, messages: object, **_: object) -> Answer:
            return Answer("<think>Down?" if asked else "<think>Down?</think> Up", False, tokens_in=1, tokens_out=1)

    asked: list[str | None] = []
    policy = EndpointPolicy(cast(Any, Server()))
    episode = policy.begin((Message("user", "Go!"),), Budget(2, 8, 64, 1.0), seed=0, session="")
    for turn in range(2):
        asked.append(asyncio.run(episode.act(turn)))
    assert asked == ["Up", ""]
