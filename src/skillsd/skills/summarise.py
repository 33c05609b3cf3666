"""From a finished trajectory to a skill: e = Analyze(trajectory, x) (METHOD.md, step 2), and what is refused.

Skills reach a language model only through `Summariser`. Whoever wrote a skill, `check_skill` reads it before
the bank does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skillsd.types import Skill, Trajectory

MAX_COPIED_TURNS = 2
"""So many consecutive turns may be quoted, action and observation; one more is a copy of the trajectory."""
MAX_COPIED_WORDS = 40
"""A run of so many words of the first prompt makes a skill a copy of it."""
MIN_PROMPT_WORDS = 8
"""Messages shorter than this may be quoted whole: "Play Sokoban." is not a copy."""
MIN_FORMAT_WORDS = 4
"""A field of fewer words is not taken for a copy of what it was to hold: "What worked" may be said."""


class SummaryError(Exception):
    """No skill came of a trajectory, for a reason that is known.

    Attributes:
        reason: what it is counted as, e.g. ``failed_http_401`` or ``rejected_malformed``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Summariser(Protocol):
    """Writes the skill of a finished trajectory, success or failure; None where there is nothing to learn.

    Raises:
        SummaryError: where it can say why there is no skill. Anything else that it raises counts as ``failed``.
    """

    async def summarise(self, trajectory: Trajectory) -> Skill | None: ...


class RuleSummariser:
    """An environment's rule-based summariser (`skillsd.envs.base.TaskSet.summariser`) as a `Summariser`.

    `fn` runs in the event loop, so that runs with it are deterministic; it has to be quick, and no timeout
    can interrupt it.
    """

    def __init__(self, fn: Callable[[Trajectory], Skill | None]) -> None:
        self._fn = fn

    async def summarise(self, trajectory: Trajectory) -> Skill | None:
        return self._fn(trajectory)


class SkillSchema(BaseModel):
    """A skill as a language model has to write it: three strings. Its JSON schema constrains the model."""

    model_config = ConfigDict(strict=True, extra="forbid", str_strip_whitespace=True, title="Skill")

    success_analysis: str = Field(description="What worked, which actions or tools were right. May be empty.")
    mistake_analysis: str = Field(
        description="Where it went wrong: wrong assumptions, unchecked parameters, moves that cannot be "
        "undone. May be empty."
    )
    golden_workflow: str = Field(description="The steps to follow next time, in order. May be empty.")

    def to_skill(self) -> Skill:
        return Skill(self.success_analysis, self.mistake_analysis, self.golden_workflow)


def check_skill(
    skill: object,
    trajectory: Trajectory,
    *,
    max_chars: int,
    max_copied_turns: int = MAX_COPIED_TURNS,
    secrets: Sequence[str] = (),
) -> str | None:
    """Why `skill` may not enter the bank as the lesson of `trajectory`, or None if it may.

    The reasons are few and fixed, to be counted: ``malformed`` (not a Skill, a field that is no string or no
    Unicode text), ``empty``, ``too_long`` (a field of more than `max_chars` characters), ``copies_format`` (a field
    says only what it was to hold, in the words of `SkillSchema`), ``copies_prompt``, ``copies_trajectory`` (a skill
    is "never the trajectory itself": it quotes more than `max_copied_turns` consecutive turns, action and observation)
    and ``leaks_answer`` (it says one of the `secrets`, see `skillsd.envs.base.TaskSet.secrets`). Copies are
    found whatever their white space and role labels; secrets as whole words, whatever their case and white space.
    """
    if not isinstance(skill, Skill):
        return "malformed"
    fields = (skill.success_analysis, skill.mistake_analysis, skill.golden_workflow)
    try:
        SkillSchema(success_analysis=fields[0], mistake_analysis=fields[1], golden_workflow=fields[2])
        "".join(fields).encode()  # a lone surrogate cannot be stored
    except (ValidationError, UnicodeEncodeError):
        return "malformed"
    if not any(field.strip() for field in fields):
        return "empty"
    if any(len(field) > max_chars for field in fields):
        return "too_long"
    if any(_copies_format(field) for field in fields):
        return "copies_format"
    text = _bare("\n".join(fields))
    if any(_copies_message(text, message.content) for message in trajectory.prompt):
        return "copies_prompt"
    if _copies_turns(text, trajectory, max_copied_turns + 1):
        return "copies_trajectory"
    if any(_says("\n".join(fields), secret) for secret in secrets):
        return "leaks_answer"
    return None


_ROLES = r"(?:turn|step)\s*\d+|system|user|assistant|agent|environment|action|observation"
_LABEL = re.compile(rf"\b(?:{_ROLES})\s*:", re.IGNORECASE)


def _bare(text: str) -> str:
    """`text` as words between single spaces, with a space at each end and without role labels."""
    return f" {' '.join(_LABEL.sub(' ', text).split())} "


def _copies_format(text: str) -> bool:
    """Whether all of `text` is a run of words of one field's description."""
    words = _words(text)
    return len(words.split()) >= MIN_FORMAT_WORDS and any(
        words in _words(field.description or "") for field in SkillSchema.model_fields.values()
    )


def _words(text: str) -> str:
    """The words of `text` alone, in lower case, between single spaces and with one at each end."""
    words = re.findall(r"\w+", text.casefold())
    return f" {' '.join(words)} "


def _copies_message(text: str, content: str) -> bool:
    words = _bare(content).split()
    if len(words) < MIN_PROMPT_WORDS:
        return False
    run = min(len(words), MAX_COPIED_WORDS)
    return any(f" {' '.join(words[i : i + run])} " in text for i in range(len(words) - run + 1))


def _copies_turns(text: str, trajectory: Trajectory, run: int) -> bool:
    # Without observations a run of turns is a list of actions, and a workflow may well be one.
    windows = (trajectory.turns[i : i + run] for i in range(len(trajectory.turns) - run + 1))
    return any(
        _bare("\n".join(f"{turn.action}\n{turn.observation}" for turn in window)) in text
        for window in windows
        if all(turn.observation.strip() for turn in window)
    )


def _says(text: str, secret: str) -> bool:
    words = r"\s+".join(re.escape(word) for word in secret.casefold().split())
    return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", text.casefold()) is not None
