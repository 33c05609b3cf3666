"""The prompt, and extraction of code from the agent's reply: one block of Python per turn.

``react`` is for capable language models: role, rules and an example turn. ``short`` is for a tiny model after a warm
start: only the supervisor and the task, and the reply is plain code.

Results depend on the exact wording: changing a text invalidates comparisons with earlier results.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from skillsd.types import Message, Task

Style = Literal["react", "short"]
STYLES: tuple[Style, ...] = ("react", "short")

MAX_PLAIN_CHARS = 20_000
"""Replies longer than this are not parsed as unfenced Python."""

_PYTHON = ("", "python", "py", "python3")

_RULES = """\
You are an autonomous agent who does tasks for your supervisor in the apps {apps}. You act by writing Python, \
which is run in a shell that stays open from turn to turn: variables, functions and imports are kept. In it, the \
object `apis` gives access to all apps: `apis.<app>.<api>(<name>=<value>, ...)`. You have {max_turns} turns.

How to act:
1. In every turn, think briefly in a line or two, then write exactly one code block that begins with ```python and \
ends with ```. Only that block is run, and you are shown what it prints: the value of the last line is not shown by \
itself, so print whatever you want to see.
2. Do not guess what an API is called, takes or returns; look it up first:
   print(apis.api_docs.show_app_descriptions())
   print(apis.api_docs.show_api_descriptions(app_name=...))
   print(apis.api_docs.show_api_doc(app_name=..., api_name=...))
3. The passwords of your supervisor's accounts are in apis.supervisor.show_account_passwords(). Most apps want you to \
log in, and then to pass the access token with every call.
4. Many APIs return one page of their results at a time. When all of them matter, ask for page after page until one \
comes back empty.
5. Work in small steps and look at a result before you build on it. If a call fails, read the error and try otherwise.
6. Nobody answers questions or confirms anything: decide for yourself, and change nothing that the task does not ask \
for.
7. When the task is done, call apis.supervisor.complete_task(). If it asks for an answer, call \
apis.supervisor.complete_task(answer=...) with the bare value: a number, a name, no sentence.

A turn looks like this:
I have to find out how notes are searched.
```python
print(apis.api_docs.show_api_descriptions(app_name="simple_note"))
```"""

_TASK = """\
Your supervisor: {first_name} {last_name}, e-mail {email}, phone {phone_number}.
Now: {datetime}.
Task: {instruction}"""

_SHORT = "I am {first_name} {last_name}, {email}, {phone_number}. Today: {date}. Task: {instruction}"


def first_prompt(task: Task, style: Style, apps: Sequence[str], max_turns: int) -> tuple[Message, ...]:
    """The first messages of an episode.

    Args:
        apps: names of the apps; the style `short` doesn't mention them, nor `max_turns`.
    """
    supervisor, moment = task.payload["supervisor"], str(task.payload["datetime"])
    instruction = str(task.payload["instruction"]).strip()
    if style == "short":
        return (Message("user", _SHORT.format(**supervisor, date=moment[:10], instruction=instruction)),)
    rules = _RULES.format(apps=", ".join(apps), max_turns=max_turns)
    text = _TASK.format(**supervisor, datetime=moment.replace("T", " "), instruction=instruction)
    return Message("system", rules), Message("user", text)


def wording(style: Style, apps: Sequence[str]) -> str:
    """Hash of the texts of this module (16 hex digits).

    It is part of the tasks' fingerprint, as models answer differently to other words.
    """
    supervisor = {"first_name": "F", "last_name": "L", "email": "E", "phone_number": "P"}
    payload = {"supervisor": supervisor, "datetime": "2023-05-18T12:00:00", "instruction": "I"}
    texts = [message.content for message in first_prompt(Task("T", "", "", payload), style, apps, 40)]
    replies = ("", "No code.", "```python\n```", "```\na()\n```\n```\nb()\n```", "a('\0')", "```sh\nls\n```")
    texts += [repr(code_of(reply, style)) for reply in replies]
    texts.append(observation("ab" * 200, 100))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Code:
    """Code to run, and a note to append to its output in the observation."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Unusable:
    """A reply without runnable code, and the observation that explains why."""

    reason: str


def code_of(reply: str, style: Style = "react") -> Code | Unusable:
    """Extract the code from an agent's reply. Accepts any text and never raises.

    If the whole reply is a Python program, that is the code. Otherwise it is the first fenced block marked as Python or
    unmarked; an unclosed block extends to the end. In the style `short`, a reply without such a block is code even if
    it doesn't parse: Python's error message is the best feedback.
    """
    reply = reply.strip()
    if not reply:
        return Unusable("Your answer is empty. Write one ```python code block.")
    if _is_program(reply):
        return _readable(Code(reply))
    blocks = [block for block in _blocks(reply) if block.language in _PYTHON]
    if not blocks and style == "short":
        return _readable(Code(reply))
    if not blocks:
        return Unusable("There is no Python code in your answer, so nothing was run. Write one ```python code block.")
    if not blocks[0].code.strip():
        return Unusable("The code block in your answer is empty, so nothing was run.")
    several = f"Only the first of your {len(blocks)} code blocks was run. Write one block a turn."
    return _readable(Code(blocks[0].code, several if len(blocks) > 1 else ""))


def turn_text(thought: str, code: str, style: Style) -> str:
    """The text of a demonstration's turn; `code_of` inverts it.

    In the style `short`, only the code, without a fence: this takes the fewest tokens, and parsing can distinguish
    programs from prose.
    """
    code = code.strip()
    if style == "short" and _is_program(code):
        return code
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    block = f"{fence}python\n{code}\n{fence}"
    return block if style == "short" or not thought.strip() else f"{thought.strip()}\n{block}"


def observation(output: str, limit: int) -> str:
    """Truncate an output to `limit` characters: two thirds from the start and one third from the end.

    A note in between gives the number of characters left out. The end is kept because tracebacks have the error there.
    """
    if len(output) <= limit:
        return output
    tail = limit // 3
    left_out = len(output) - limit
    return f"{output[: limit - tail]}\n[{left_out} characters left out]\n{output[len(output) - tail :]}"


@dataclass(frozen=True)
class _Block:
    language: str
    code: str


_OPENING = re.compile(r"(`{3,})[ \t]*([\w+-]*)[^`]*")


def _blocks(reply: str) -> Iterator[_Block]:
    """The fenced blocks in order. A fence may open after text ("Code: ```python") and close after code."""
    fence, language, indent, lines = "", "", 0, list[str]()
    for raw in reply.split("\n"):
        line = raw.rstrip()
        start = line.find("```")
        opening = _OPENING.fullmatch(line, start) if start >= 0 else None
        at_start = start >= 0 and not line[:start].strip()
        if not fence:
            if opening and (at_start or line.endswith("```") or opening[2].lower() in _PYTHON[1:]):
                fence, language, indent, lines = opening[1], opening[2].lower(), start if at_start else 0, []
            continue
        closes = at_start and line.strip().startswith(fence)
        if closes or line.endswith(fence):
            if not closes:
                lines.append(_dedent(line[: -len(fence)], indent))
            yield _Block(language, "\n".join(lines).strip("\n"))
            # A new opening fence also closes a block that was left open.
            again = closes and opening is not None and opening[2] != ""
            fence, language, lines = (fence, opening[2].lower(), []) if again and opening else ("", "", [])
        else:
            lines.append(_dedent(raw, indent))
    if fence:
        yield _Block(language, "\n".join(lines).strip("\n"))


def _dedent(line: str, indent: int) -> str:
    """Remove the indentation of a block inside a list item."""
    return line[indent:] if not line[:indent].strip() else line


def _is_program(text: str) -> bool:
    """Whether the text parses as Python and has an effect: a single word or "Thought: none" also parses."""
    if len(text) > MAX_PLAIN_CHARS:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return any(_does_something(statement) for statement in ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _does_something(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return any(isinstance(node, ast.Call) for node in ast.walk(statement))
    return not (isinstance(statement, ast.AnnAssign) and statement.value is None)


def _readable(code: Code) -> Code | Unusable:
    """Reject characters that can't be sent to an interpreter: lone surrogates and null characters."""
    if "\0" in code.text or any("\ud800" <= character <= "\udfff" for character in code.text):
        return Unusable("Your code holds characters that Python cannot read, so nothing was run.")
    return code
