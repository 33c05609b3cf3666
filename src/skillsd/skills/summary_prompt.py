"""What a language model is told when it is to write a skill, and how its answer is read.

The template is a text file that becomes one user message. Its fields: ``{prompt}`` (what the student was told first),
``{trajectory}`` (its turns; this field has to be there), ``{outcome}``, ``{score}`` and ``{format}`` (the JSON object
to answer with). ``{{`` and ``}}`` stand for braces.

An episode that is too long is condensed, a step at a time until it fits:

1. Actions and observations are cut to 4000, 2000, 1000, 500, 250 characters: two thirds from the beginning, one third
   from the end, and between them a note of how much is left out.
2. Turns are left out: half of them, half of the rest ... down to two. A quarter of those that stay, at least one, is
   from the beginning, the others from the end; a note says which are left out.
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
"""Characters that long texts are cut to, one after the other."""
MAX_ANSWER_CHARS = 100_000
"""A longer answer is not even read."""

_OUTCOMES = {
    Outcome.SOLVED: "solved",
    Outcome.FAILED: "not solved when the episode was over",
    Outcome.TRUNCATED_TURNS: "not solved within the turns allowed",
    Outcome.TRUNCATED_TOKENS: "not solved within the length allowed",
}


class SummaryPrompt:
    """A template with the limits of what is written under it.

    Args:
        template: its text, see `load_prompt`.
        max_chars: the most characters that a field of the skill may have.
        max_input_chars: the most characters of the whole message.
    """

    def __init__(self, template: str, *, max_chars: int, max_input_chars: int) -> None:
        self._lines = [parse_line(line, FIELDS) for line in template.split("\n")]
        self._format = _format(max_chars)
        self._max_input_chars = max_input_chars

    def render(self, trajectory: Trajectory, fits: Callable[[str], bool] = lambda text: True) -> tuple[str, bool]:
        """The message about `trajectory`, and whether it was condensed.

        Args:
            fits: whether a text is short enough, beside `max_input_chars`.

        Raises:
            SummaryError: if it cannot be made to fit (``failed_no_room``).
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
        raise SummaryError("failed_no_room", "even condensed, the episode is longer than the summariser may read")

    def frame(self) -> str:
        """The message without anything of an episode in it."""
        return self._fill({**dict.fromkeys(FIELDS, ""), "format": self._format})

    def _fill(self, values: dict[str, str]) -> str:
        return "\n".join(
            "".join(literal + (values[field] if field else "") for literal, field in line) for line in self._lines
        )


def load_prompt(name_or_path: str | Path) -> str:
    """The text of a summariser's prompt that comes with skillsd (``summarise``) or of your own file.

    What ends in ``.txt`` or has a slash in it is a path. The file's last line break is left out.

    Raises:
        UserError: if there is no such file, or it names unknown fields or not ``{trajectory}``.
    """
    text, used = read_template(name_or_path, "summarise", FIELDS)
    if "trajectory" not in used:
        raise UserError(f"template {name_or_path} does not name {{trajectory}}: there would be nothing to summarise")
    return text


def parse_skill(answer: str, *, cut: bool = False) -> Skill:
    """The skill in a model's answer: the last JSON object in it that is one, whatever prose stands around.

    Args:
        cut: the model was stopped before it came to its end.

    Raises:
        SummaryError: ``rejected_empty``, ``rejected_malformed``, or ``rejected_too_long`` (cut before the skill was
            complete, or more than `MAX_ANSWER_CHARS`).
    """
    if len(answer) > MAX_ANSWER_CHARS:
        raise SummaryError("rejected_too_long", f"the summariser's answer has {len(answer)} characters")
    found: Skill | None = None
    at = answer.find("{")
    while at >= 0:
        try:
            value, end = _DECODER.raw_decode(answer, at)
            found = SkillSchema.model_validate(value).to_skill()
        except ValueError:  # no JSON, or no skill (which may be inside: the next brace)
            end = at + 1
        except RecursionError:  # a thousand braces deep: nothing to look for
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
    """How much is left of an episode: characters of a text of a turn, turns, characters of a message of the prompt."""

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
