"""What the agent is told, and how its answers are read: one block of Python a turn.

``react`` is for real language models: role, rules and an example of a turn. ``short`` is for a tiny model that was
shown in a warm start what to do: who it works for and the task, and its answer is plain code.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from skillsd.types import Message, Task

Style = Literal["react", "short"]
STYLES: tuple[Style, ...] = ("react", "short")

MAX_PLAIN_CHARS = 20_000
"""A longer answer is not tried as Python without a fence: nobody writes such a program by hand."""

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
    """The messages that an episode of `task` begins with.

    Args:
        apps: names of the apps; `short` leaves them, and `max_turns`, out.
    """
    supervisor, moment = task.payload["supervisor"], str(task.payload["datetime"])
    instruction = str(task.payload["instruction"]).strip()
    if style == "short":
        return (Message("user", _SHORT.format(**supervisor, date=moment[:10], instruction=instruction)),)
    rules = _RULES.format(apps=", ".join(apps), max_turns=max_turns)
    words = _TASK.format(**supervisor, datetime=moment.replace("T", " "), instruction=instruction)
    return Message("system", rules), Message("user", words)


@dataclass(frozen=True)
class Code:
    """Code to run, and what the observation has to say beside its output, if anything."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Unusable:
    """An answer without code, and what the agent is told about it."""

    reason: str


def code_of(reply: str, style: Style = "react") -> Code | Unusable:
    """The code in an agent's answer, whatever text that is; never raises.

    In the style `short` an answer without a fence is code, however broken: Python says best what is wrong with it.
    Otherwise an answer that is a Python program as a whole is one. Otherwise its first fenced block counts, if it is
    marked as Python or not at all; an unclosed one goes on to the end. What is before ``</think>`` does not count.
    """
    reply = reply.rpartition("</think>")[2].strip()
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
    """A turn as a demonstration writes it; `code_of` gives the code back.

    In the style `short`, the code alone without a fence: the fewest tokens, and a program is told from prose by
    parsing it.
    """
    code = code.strip()
    if style == "short" and _is_program(code):
        return code
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    block = f"{fence}python\n{code}\n{fence}"
    return block if style == "short" or not thought.strip() else f"{thought.strip()}\n{block}"


def observation(output: str, limit: int) -> str:
    """What the agent is shown of an output: all of it, or two thirds of `limit` characters from its beginning and one
    third from its end, where tracebacks say what is wrong, with a note of how much is left out in between."""
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
    """The fenced blocks in order. A fence may open behind words ("Code: ```python") and close behind code."""
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
            # A block that was forgotten to be closed before the next one.
            again = closes and opening is not None and opening[2] != ""
            fence, language, lines = (fence, opening[2].lower(), []) if again and opening else ("", "", [])
        else:
            lines.append(_dedent(raw, indent))
    if fence:
        yield _Block(language, "\n".join(lines).strip("\n"))


def _dedent(line: str, indent: int) -> str:
    """A list item's block is indented as a whole; its code is not."""
    return line[indent:] if not line[:indent].strip() else line


def _is_program(text: str) -> bool:
    """Whether the text is Python that does something: a lone word, "Thought: none" or a comment would parse, too."""
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
    """Refuses what cannot even be sent to an interpreter: lone surrogates and null characters."""
    if "\0" in code.text or any("\ud800" <= character <= "\udfff" for character in code.text):
        return Unusable("Your code holds characters that Python cannot read, so nothing was run.")
    return code
