"""The texts around a text game: the first prompt, and the command in an agent's reply.

Styles:

- ``react``: the agent thinks, then writes ``Action: command`` on a line of its own. For language models.
- ``words``: a command is one word, with underscores instead of spaces, and the game's texts are lower-case words
  without punctuation. For tiny models, whose every turn is one token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from skillsd.types import Message

Style = Literal["react", "words"]
STYLES: tuple[str, ...] = get_args(Style)

MAX_COMMAND_CHARS = 200
"""Longer commands are refused without asking the engine, whose parser is slow on long ones."""

_RULES = """\
You play a text game. In each turn, think briefly, then write one command on a line of its own, like this:
Action: look around
{commands}
You have {max_turns} turns."""

_FORMAT = "There is no command in your answer. Write one on a line of its own: Action: look around"
_EMPTY = "empty"


@dataclass(frozen=True)
class Refused:
    """A reply that is not sent to the engine, and the observation that explains why."""

    reason: str


def first_prompt(style: Style, task: str, text: str, commands: str, max_turns: int) -> tuple[Message, ...]:
    """An episode's first prompt.

    Args:
        task: the game's own description of the task.
        text: the first `observation`.
        commands: which commands there are, in a sentence or two.
    """
    if style == "words":
        return (Message("user", f"{words(task)} ; {text}"),)
    rules = _RULES.format(commands=commands, max_turns=max_turns)
    return Message("system", rules), Message("user", f"{task.strip()}\n\n{text.strip()}")


def observation(style: Style, text: str, limit: int) -> str:
    """What the agent reads of a text, cut after `limit` characters."""
    text = words(text) if style == "words" else text.strip()
    return text if len(text) <= limit else f"{text[:limit]}\n[{len(text) - limit} characters left out]"


def words(text: str) -> str:
    """Lower-case words without punctuation, or ``empty``."""
    return " ".join(re.findall(r"[a-z0-9][a-z0-9_-]*", text.lower())) or _EMPTY


def written(style: Style, command: str) -> str:
    """A command as the agent writes it; `command_of` inverts it."""
    return command.replace(" ", "_") if style == "words" else f"Action: {command}"


def command_of(style: Style, reply: str) -> str | Refused:
    """The command in an agent's reply. Accepts any text and never raises."""
    if style == "words":
        command = reply.strip().replace("_", " ")
    else:
        lines = [line.strip() for line in reply.splitlines() if line.strip()]
        marked = [line for line in lines if re.match(r"\W*action\W*:", line, re.IGNORECASE)]
        if not marked and len(lines) != 1:
            return Refused(_FORMAT)
        command = re.sub(r"^\W*action\W*:\W*", "", marked[-1], flags=re.IGNORECASE) if marked else lines[0]
    command = " ".join(command.strip("`*\"' ").split())
    if not command or not command.isprintable() or not command.isascii():
        return Refused("That is no command." if style == "react" else "unknown command")
    if len(command) > MAX_COMMAND_CHARS:
        return Refused(f"Your command is longer than {MAX_COMMAND_CHARS} characters.")
    return command
