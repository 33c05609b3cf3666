"""What a model thinks is not what it does: an action is the text after the thinking."""

from __future__ import annotations

import re

TAGS = {
    "<think>": "</think>",  # Qwen3, DeepSeek R1, GLM, SmolLM3 and most others
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",  # EXAONE
    "[THINK]": "[/THINK]",  # Magistral
    "<seed:think>": "</seed:think>",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",  # Kimi
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|channel>": "<channel|>",  # Gemma 4
}
"""Opening tag -> closing tag."""

_THOUGHT = re.compile("|".join(f"{re.escape(start)}.*?{re.escape(end)}" for start, end in TAGS.items()), re.DOTALL)
_END = re.compile("|".join(map(re.escape, TAGS.values())))
_START = re.compile("|".join(map(re.escape, TAGS)))


def without_thinking(text: str, opened: str = "") -> str:
    """The part of a reply that is an action: without thoughts, and empty if a thought is unfinished.

    Args:
        opened: the tag that opens a thought at the end of the prompt, before the reply. See `opened_by`.
    """
    text = _THOUGHT.sub("", opened + text)
    if _START.search(text):
        return ""
    *_, action = _END.split(text)  # an end without a start: the reply began inside the thought
    return action


def opened_by(prompt: str) -> str:
    """The tag of the thought that a prompt leaves open; empty if there is none."""
    return next(reversed(_START.findall(_THOUGHT.sub("", prompt))), "")
