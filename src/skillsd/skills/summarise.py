"""From a finished trajectory to a skill: e = Analyze(trajectory, x) (docs/method.md, step 8), and the checks on it.

Every skill comes from a `Summariser`, and passes `check_skill` before it enters the bank.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skillsd import plugins
from skillsd.errors import UserError
from skillsd.types import Skill, Trajectory

MAX_COPIED_TURNS = 2
"""Consecutive turns, action and observation, that a skill may quote; one more counts as a copy of the trajectory."""
MAX_COPIED_WORDS = 40
"""A skill that quotes so many consecutive words of the first prompt counts as a copy of it."""
MIN_PROMPT_WORDS = 8
"""Messages of the first prompt with fewer words may be quoted in full: "Play Sokoban." is not a copy."""
MIN_FORMAT_WORDS = 4
"""A field with fewer words doesn't count as a copy of its description: "What worked" is allowed."""


class SummaryError(Exception):
    """A trajectory gave no skill, for a known reason.

    Attributes:
        reason: name of its count, e.g. ``failed_http_401`` or ``rejected_malformed``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Summariser(Protocol):
    """Writes skills. Implement this to bring your own (``skills.summariser: module:Class``)."""

    async def summarise(self, trajectory: Trajectory) -> Skill | None:
        """The skill of a finished trajectory, success or failure; None if there is nothing to learn from it.

        Raises:
            SummaryError: for a failure with a known reason. Any other exception is counted as ``failed``.
        """
        ...


class RuleSummariser:
    """A plain function as a `Summariser`, such as an environment's rules (`skillsd.envs.base.TaskSet.summariser`).

    `fn` runs in the event loop, so runs with it are deterministic. It must be fast: no timeout can interrupt it.
    """

    def __init__(self, fn: Callable[[Trajectory], Skill | None]) -> None:
        self._fn = fn

    async def summarise(self, trajectory: Trajectory) -> Skill | None:
        result = self._fn(trajectory)
        return await result if inspect.isawaitable(result) else result


def load_summariser(target: str, options: Mapping[str, Any]) -> Summariser:
    """A summariser of your own (``skills.summariser``).

    Args:
        target: ``module:Class``, a class with ``async def summarise(trajectory)``, or ``module:function``, a function
            (trajectory) -> `Skill` or None.
        options: keyword arguments of the class (``summariser.options``).

    Raises:
        UserError: if it can't be imported or constructed, or is neither.
    """
    found = find_summariser(target)
    if isinstance(found, type):
        given = f"with summariser.options {dict(options)}"
        made: Summariser = plugins.construct(f"summariser {target!r}", given, found, options)
        return made
    if hasattr(found, "summarise"):
        summariser: Summariser = found
        return summariser
    if options:
        raise UserError(
            f"summariser.options is {dict(options)}, but {target!r} is a function and takes none: leave them out, or "
            "give a class"
        )
    return RuleSummariser(found)


def find_summariser(target: str) -> Any:
    """The class, object or function of `load_summariser`, not constructed yet.

    Raises:
        UserError: if it can't be imported, or has the wrong form.
    """
    found = plugins.find("summariser", target, ())
    method = getattr(found, "summarise", None)
    if inspect.iscoroutinefunction(method):
        return found
    if method is not None:
        fault = "has a method `summarise` that is not async"
    elif isinstance(found, type):
        fault = "is a class without a method `summarise`"
    elif inspect.iscoroutinefunction(found):
        fault = "is an async function"
    elif not callable(found):
        fault = f"is {type(found).__name__}"
    else:
        return found
    raise UserError(
        f"summariser {target!r} {fault}; expected a class with `async def summarise(trajectory)`, or a plain function "
        "(trajectory) -> Skill"
    )


class SkillSchema(BaseModel):
    """A skill as a language model must write it: three strings. Its JSON schema constrains the model's output."""

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
    """The reason why `skill`, written from `trajectory`, may not enter the bank; None if it may.

    - ``malformed``: not a `Skill`, or a field is not a string or not valid Unicode.
    - ``empty``: all fields are blank.
    - ``too_long``: a field has more than `max_chars` characters.
    - ``copies_format``: a field only repeats its description in `SkillSchema`.
    - ``copies_prompt``: it quotes the first prompt.
    - ``copies_trajectory``: it quotes more than `max_copied_turns` consecutive turns, action and observation. (A skill
      is "never the trajectory itself".)
    - ``leaks_answer``: it contains one of the `secrets`, see `skillsd.envs.base.TaskSet.secrets`.

    Copies are found regardless of white space and role labels; secrets as whole words, regardless of case and white
    space.
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
    if any(_contains("\n".join(fields), secret) for secret in secrets):
        return "leaks_answer"
    return None


_ROLES = r"(?:turn|step)\s*\d+|system|user|assistant|agent|environment|action|observation"
_LABEL = re.compile(rf"\b(?:{_ROLES})\s*:", re.IGNORECASE)


def _bare(text: str) -> str:
    """`text` as words between single spaces, with a space at each end and without role labels."""
    return f" {' '.join(_LABEL.sub(' ', text).split())} "


def _copies_format(text: str) -> bool:
    """Whether all of `text` is a sequence of words from one field's description."""
    words = _words(text)
    return len(words.split()) >= MIN_FORMAT_WORDS and any(
        words in _words(field.description or "") for field in SkillSchema.model_fields.values()
    )


def _words(text: str) -> str:
    """The words of `text`, in lower case, between single spaces and with one at each end."""
    words = re.findall(r"\w+", text.casefold())
    return f" {' '.join(words)} "


def _copies_message(text: str, content: str) -> bool:
    words = _bare(content).split()
    if len(words) < MIN_PROMPT_WORDS:
        return False
    run = min(len(words), MAX_COPIED_WORDS)
    return any(f" {' '.join(words[i : i + run])} " in text for i in range(len(words) - run + 1))


def _copies_turns(text: str, trajectory: Trajectory, run: int) -> bool:
    # Without observations, consecutive turns are just a list of actions, which is a legitimate workflow.
    windows = (trajectory.turns[i : i + run] for i in range(len(trajectory.turns) - run + 1))
    return any(
        _bare("\n".join(f"{turn.action}\n{turn.observation}" for turn in window)) in text
        for window in windows
        if all(turn.observation.strip() for turn in window)
    )


def _contains(text: str, secret: str) -> bool:
    words = r"\s+".join(re.escape(word) for word in secret.casefold().split())
    return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", text.casefold()) is not None
