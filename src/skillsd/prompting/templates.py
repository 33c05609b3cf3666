"""What the teacher is told: a skill, put into words by a template and appended where a user would write it.

A template is a text file. Each line is a piece that may name fields of the skill: ``{success_analysis}``,
``{mistake_analysis}``, ``{golden_workflow}``.

- A line that names an empty field is dropped.
- A backslash at the end of a line joins it to the next line that is left, without a line break.
- ``{{`` and ``}}`` stand for braces. Leading blank lines and spaces count: the text is appended as it stands.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from pathlib import Path

from skillsd.errors import UserError, unknown_name
from skillsd.types import Message, Skill

PROMPTS = Path(__file__).parent / "prompts"
FIELDS = tuple(field.name for field in dataclasses.fields(Skill))


def with_context(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """The first prompt x with `text` appended to its last user message: the teacher's prompt x + S(x).

    Raises:
        ValueError: if there is no user message.
    """
    for i in range(len(messages) - 1, -1, -1):
        if messages[i].role == "user":
            extended = dataclasses.replace(messages[i], content=messages[i].content + text)
            return (*messages[:i], extended, *messages[i + 1 :])
    roles = ", ".join(message.role for message in messages) or "none"
    raise ValueError(f"the teacher's context goes into the last user message; the prompt's roles are: {roles}")


def render_skill(skill: Skill, template: str) -> str:
    """`skill` in the words of `template` (its text; see `load_template` and this module's docstring).

    Raises:
        ValueError: for an empty skill, of which no template has anything to say.
        UserError: for a template that is not one.
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
    """The text of a template that comes with skillsd (``teacher``, ``teacher_terse``) or of your own file.

    What ends in ``.txt`` or has a slash in it is a path. The file's last line break is left out.

    Raises:
        UserError: if there is no such template, or it names unknown fields or none.
    """
    text, used = read_template(name_or_path, "teacher", FIELDS)
    if not used:
        raise UserError(
            f"template {name_or_path} names no field of a skill; expected at least one of {_braced(FIELDS)}"
        )
    return text


def read_template(name_or_path: str | Path, kind: str, known: Sequence[str]) -> tuple[str, set[str]]:
    """The text of a template, and which of the `known` fields it names.

    Args:
        name_or_path: a path if it ends in ``.txt`` or has a slash in it; otherwise one of the package's templates
            whose names begin with `kind`.

    Raises:
        UserError: if there is no such template, or it names unknown fields.
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
        raise UserError(f"cannot read the template {given}: {error}. Give a text file, or a name.") from error
    try:
        return text, {field for line in text.split("\n") for _, field in parse_line(line, known) if field}
    except UserError as error:
        raise UserError(f"template {given}: {error}") from error


def parse_line(line: str, known: Sequence[str]) -> list[tuple[str, str | None]]:
    """(literal text, field after it or None) for each piece of a template's line. Raises UserError."""
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
