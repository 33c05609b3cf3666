"""The teacher's context: a skill rendered with a template and added to the last user message.

A template is a text file. Its lines may contain fields of the skill: ``{success_analysis}``, ``{mistake_analysis}``,
``{golden_workflow}``.

- A line with an empty field is dropped.
- A backslash at the end of a line joins it to the next remaining line, without a line break.
- ``{{`` and ``}}`` stand for braces.
- Blank lines and spaces at the beginning separate the skill from the task, whichever of them comes first.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from skillsd.errors import UserError, unknown_name
from skillsd.types import Message, Skill

PROMPTS = Path(__file__).parent / "prompts"
FIELDS = tuple(field.name for field in dataclasses.fields(Skill))

Place = Literal["before", "after"]
"""Where a context stands in the message that it is added to. ``before``: it is prepended, as in the paper."""


def with_context(messages: Sequence[Message], text: str, place: Place) -> tuple[Message, ...]:
    """The first prompt x with `text` added to its last user message: the teacher's prompt x + S(x).

    Args:
        text: a rendered context. Its leading white space separates it from the message. An empty one adds nothing.

    Raises:
        ValueError: if there is no user message.
    """
    for i in range(len(messages) - 1, -1, -1):
        if messages[i].role == "user":
            content = messages[i].content
            bare = text.lstrip()
            separator = text[: len(text) - len(bare)]
            content = f"{bare}{separator}{content}" if place == "before" else f"{content}{text}"
            return (*messages[:i], dataclasses.replace(messages[i], content=content), *messages[i + 1 :])
    roles = ", ".join(message.role for message in messages) or "none"
    raise ValueError(f"a context is added to the last user message, but the prompt's roles are: {roles}")


def render_skill(skill: Skill, template: str) -> str:
    """Fill in a template.

    Args:
        template: its text (`load_template`), in the syntax of this module's docstring.

    Raises:
        ValueError: for an empty skill.
        UserError: if the template is malformed.
    """
    values = {name: getattr(skill, name).strip() for name in FIELDS}
    if not any(values.values()):
        raise ValueError("an empty skill cannot be rendered")
    text, separator = "", ""
    for line in template.split("\n"):
        joined = line.endswith("\\")
        pieces = parse_line(line.removesuffix("\\"), FIELDS)
        if all(field is None or values[field] for _, field in pieces):
            text += separator + "".join(literal + (values[field] if field else "") for literal, field in pieces)
            separator = "" if joined else "\n"
    return text


def load_template(name_or_path: str | Path) -> str:
    """The text of a skill template: one of the package's (``teacher``, ``teacher_terse``) or your own file.

    A name that ends in ``.txt`` or contains a slash is a path. The file's last line break is removed.

    Raises:
        UserError: if there is no such template, or it contains unknown fields or no field at all.
    """
    text, used = read_template(name_or_path, "teacher", FIELDS)
    if not used:
        raise UserError(
            f"template {name_or_path} contains no field of a skill; expected at least one of {_braced(FIELDS)}"
        )
    return text


def read_template(name_or_path: str | Path, kind: str, known: Sequence[str]) -> tuple[str, set[str]]:
    """The text of a template, and which of the `known` fields it contains.

    Args:
        name_or_path: a path if it ends in ``.txt`` or contains a slash; otherwise one of the package's templates, whose
            names start with `kind`.

    Raises:
        UserError: if there is no such template, or it contains unknown fields.
    """
    given = str(name_or_path)
    path = Path(given)
    if path.suffix != ".txt" and len(path.parts) == 1:
        shipped = {file.stem: file for file in PROMPTS.glob(f"{kind}*.txt")}
        if given not in shipped:
            raise unknown_name("template", given, shipped)
        path = shipped[given]
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the template {given}: {error}. Give a text file, or a template's name."
        ) from error
    try:
        return text, {field for line in text.split("\n") for _, field in parse_line(line, known) if field}
    except UserError as error:
        raise UserError(f"template {given}: {error}") from error


def parse_line(line: str, known: Sequence[str]) -> list[tuple[str, str | None]]:
    """(literal text, the field after it or None) for each piece of a template's line.

    Raises:
        UserError: for unknown fields or unbalanced braces.
    """
    try:
        pieces = list(string.Formatter().parse(line))
    except ValueError as error:
        raise UserError(f"cannot read the line {line!r}: {error}. Write {{{{ and }}}} for braces.") from error
    for _, field, spec, conversion in pieces:
        if field is not None and (field not in known or spec or conversion):
            raise UserError(f"unknown field in the line {line!r}; expected {_braced(known)}")
    return [(literal, field) for literal, field, _, _ in pieces]


def _braced(known: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in known)
