"""The prompt with which a language model writes a skill, and the parser of its answer.

The template is a text file that becomes one user message. Its fields: ``{prompt}`` (the episode's first messages),
``{trajectory}`` (its turns; required), ``{outcome}``, ``{score}`` (its reward, in per cent) and ``{format}`` (the JSON
object to answer with). ``{{`` and ``}}`` stand for braces.

An episode that is too long is condensed, one step at a time, until it fits:

1. Actions and observations are cut to 4000, 2000, 1000, 500, 250 characters: two thirds from the beginning and one
   third from the end, with a note of how much was left out between them.
2. Turns are left out: half of them, then half of the rest, down to two. A quarter of the remaining ones (at least one)
   are from the beginning, the others from the end, with a note of which were left out.
3. The messages of the first prompt are cut as in 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from skillsd.errors import UserError
from skillsd.prompting.templates import parse_line, read_template
from skillsd.skills.summarise import SkillSchema, SummaryError
from skillsd.types import Outcome, Skill, Trajectory, Turn

FIELDS = ("prompt", "trajectory", "outcome", "score", "format")
LENGTHS = (4000, 2000, 1000, 500, 250)
"""Lengths in characters that long texts are cut to, tried in this order."""
MAX_ANSWER_CHARS = 100_000
"""Longer answers are rejected without parsing."""

_OUTCOMES = {
    Outcome.SOLVED: "solved",
    Outcome.FAILED: "not solved when the episode was over",
    Outcome.TRUNCATED_TURNS: "not solved within the turns allowed",
    Outcome.TRUNCATED_TOKENS: "not solved within the length allowed",
}


class SummaryPrompt:
    """Renders trajectories with a template, within length limits.

    Args:
        template: its text, see `load_prompt`.
        max_chars: maximum length of a skill's field, stated in the prompt.
        max_input_chars: maximum length of the whole message.
    """

    def __init__(self, template: str, *, max_chars: int, max_input_chars: int) -> None:
        self._lines = [parse_line(line, FIELDS) for line in template.split("\n")]
        self._format = _format(max_chars)
        self._max_input_chars = max_input_chars

    def render(self, trajectory: Trajectory, fits: Callable[[str], bool] = lambda text: True) -> tuple[str, bool]:
        """The message about `trajectory`, and whether it was condensed.

        Args:
            fits: a further condition on the text's length, besides `max_input_chars`.

        Raises:
            SummaryError: if it does not fit even when condensed (``failed_no_room``).
        """
        for number, cut in enumerate(_cuts(len(trajectory.turns))):
            text = self._fill(
                {
                    "prompt": "\n".join(_shorten(message.content, cut.prompt) for message in trajectory.prompt),
                    "trajectory": _turns(trajectory.turns, cut),
                    "outcome": _OUTCOMES.get(trajectory.outcome, trajectory.outcome.value),
                    "score": f"{trajectory.reward:.0%}",
                    "format": self._format,
                }
            )
            if len(text) <= self._max_input_chars and fits(text):
                return text, number > 0
        raise SummaryError("failed_no_room", "the episode is too long for the summariser, even when condensed")

    def frame(self) -> str:
        """The message without an episode: its fixed part."""
        return self._fill({**dict.fromkeys(FIELDS, ""), "format": self._format})

    def _fill(self, values: dict[str, str]) -> str:
        return "\n".join(
            "".join(literal + (values[field] if field else "") for literal, field in line) for line in self._lines
        )


def load_prompt(name_or_path: str | Path) -> str:
    """The text of a summariser's prompt: the package's (``summarise``) or your own file.

    A name that ends in ``.txt`` or contains a slash is a path. The file's last line break is removed.

    Raises:
        UserError: if there is no such file, it contains unknown fields, or ``{trajectory}`` is missing.
    """
    text, used = read_template(name_or_path, "summarise", FIELDS)
    if "trajectory" not in used:
        raise UserError(f"template {name_or_path} lacks the field {{trajectory}}: there would be nothing to summarise")
    return text


def parse_skill(answer: str, *, cut: bool = False) -> Skill:
    """The skill in a model's answer: the last JSON object in it that is a skill. Any text around it is ignored.

    Args:
        cut: the answer was truncated at its maximum length.

    Raises:
        SummaryError: ``rejected_empty``, ``rejected_malformed``, or ``rejected_too_long`` (truncated before the skill
            was complete, or longer than `MAX_ANSWER_CHARS`).
    """
    if len(answer) > MAX_ANSWER_CHARS:
        raise SummaryError("rejected_too_long", f"the summariser's answer has {len(answer)} characters")
    found: Skill | None = None
    at = answer.find("{")
    while at >= 0:
        try:
            value, end = _DECODER.raw_decode(answer, at)
            found = SkillSchema.model_validate(value).to_skill()
        except ValueError:  # not JSON, or not a skill; it may contain one, so go on at the next brace
            end = at + 1
        except RecursionError:  # nested a thousand levels deep: not a skill
            break
        at = answer.find("{", end)
    if found is None and cut:
        raise SummaryError("rejected_too_long", "the summariser's answer was cut at summariser.max_output_tokens")
    if not answer.strip():
        raise SummaryError("rejected_empty", "the summariser's answer is empty")
    if found is None:
        raise SummaryError("rejected_malformed", f"there is no skill in the summariser's answer {answer[:80]!r}")
    return found


_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings


@dataclass(frozen=True)
class _Cut:
    """How far an episode is condensed: characters per text of a turn, turns, characters per message of the prompt."""

    text: int | None
    turns: int
    prompt: int | None = None


def _cuts(turns: int) -> Iterator[_Cut]:
    yield _Cut(None, turns)
    for length in LENGTHS:
        yield _Cut(length, turns)
    while turns > 2:
        turns = max(2, turns // 2)
        yield _Cut(LENGTHS[-1], turns)
    for length in LENGTHS:
        yield _Cut(LENGTHS[-1], turns, length)


def _turns(turns: tuple[Turn, ...], cut: _Cut) -> str:
    blocks = [
        f"Turn {number}\nAction: {_shorten(turn.action, cut.text)}\nObservation: {_shorten(turn.observation, cut.text)}"
        for number, turn in enumerate(turns, 1)
    ]
    if cut.turns < len(turns):
        first = max(1, cut.turns // 4)
        last = len(turns) - (cut.turns - first)
        blocks[first:last] = [f"[turns {first + 1} to {last} are left out]"]
    return "\n\n".join(blocks)


def _shorten(text: str, length: int | None) -> str:
    if length is None or len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail]} [{len(text) - length} characters are left out] {text[-tail:]}"


def _format(max_chars: int) -> str:
    fields = "\n".join(f'"{name}": {field.description}' for name, field in SkillSchema.model_fields.items())
    return (
        "Answer with one JSON object and nothing else. It has exactly these keys, and each value is a string of at "
        f"most {max_chars} characters:\n{fields}"
    )
