"""Recorded trajectories in other tools' formats: Inspect's log, ATIF, Trackio's traces, plain JSON lines.

Numbers that JSON lacks (nan, infinities) become null, and half surrogate pairs, which UTF-8 lacks, question marks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillsd.errors import UserError
from skillsd.rollouts.groups import RecordedEpisode, RecordedGroup

if TYPE_CHECKING:
    from skillsd.runs.opened import OpenRun


@dataclass(frozen=True)
class NamedEpisode:
    """A recorded episode with its place in the run.

    Attributes:
        place: number of the group in its iteration, from 0.
        member: number of the episode in its group, from 0.
    """

    group: RecordedGroup
    place: int
    member: int

    @property
    def episode(self) -> RecordedEpisode:
        return self.group.episodes[self.member]

    @property
    def name(self) -> str:
        """As `skillsd show` lists it."""
        return f"{self.group.iteration}.{self.place}.{self.member}"

    @cached_property
    def messages(self) -> list[dict[str, str]]:
        """The dialogue under the plain prompt: role and content."""
        t = self.episode.trajectory
        said = [(message.role, message.content) for message in t.prompt]
        for turn in t.turns:
            said += [("assistant", turn.action), ("user", turn.observation)]
        return [{"role": role, "content": clean(content)} for role, content in said]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is known of the whole episode, JSON."""
        t, group, gaps = self.episode.trajectory, self.group, self.episode.gaps
        return {
            "iteration": group.iteration,
            "episode": self.name,
            "task": clean(t.task.id),
            "difficulty": t.task.difficulty,
            "outcome": t.outcome.value,
            "reward": t.reward,
            "success": t.success,
            "advantage": self.episode.advantage,
            "seed": t.seed,
            "turns": len(t.turns),
            "sampled_tokens": t.action_tokens,
            "taught": group.taught,
            "untaught": group.untaught,
            "context": group.context,
            "skill": group.skill_id,
            "context_text": None if group.context_text is None else clean(group.context_text),
            "gap": sum(gaps) / len(gaps) if gaps and all(map(math.isfinite, gaps)) else None,
        }

    @cached_property
    def turns(self) -> list[dict[str, Any]]:
        """By turn, its sampled ids and their log-probs: ``logprobs`` of the sampling policy, of student and teacher."""
        t, e = self.episode.trajectory, self.episode
        columns = {
            "logprobs": e.old_logprobs,
            "student_logprobs": e.student_logprobs,
            "teacher_logprobs": e.teacher_logprobs,
        }
        split = {name: e.by_turn(values) for name, values in columns.items()}
        return [
            {
                "tokens": list(t.tokens[turn.start : turn.end]),
                **{name: finite(values[number]) for name, values in split.items()},
            }
            for number, turn in enumerate(t.turns)
        ]


def clean(text: str) -> str:
    """The text, without half surrogate pairs."""
    return text.encode("utf-8", "replace").decode("utf-8")


def finite(values: Sequence[float] | None) -> list[float | None] | None:
    """The values, None for those that are not finite."""
    if values is None:
        return None
    return [value if math.isfinite(value) else None for value in values]


Write = Callable[["OpenRun", Sequence[NamedEpisode], Path], str]
"""(run, its episodes, where to) -> the command that shows it; empty if there is none."""


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        default: file or folder, in the run's folder ``exports``; None if the library has a place of its own.
        folder: whether it writes a folder.
        extra: the extra of skillsd that installs its library.
    """

    module: str
    default: str | None
    folder: bool = False
    extra: str | None = None

    @property
    def write(self) -> Write:
        """
        Raises:
            UserError: if the format's library is not installed.
        """
        try:
            write: Write = import_module(f"skillsd.runs.exports.{self.module}").write
        except ModuleNotFoundError as error:
            raise UserError(
                f"this format needs {error.name}: pip install 'skillsd[{self.extra}]', or choose another one"
            ) from error
        return write


FORMATS = {
    "inspect": Format("inspect_log", "trajectories.eval", extra="inspect"),
    "atif": Format("atif", "atif", folder=True),
    "jsonl": Format("jsonl", "trajectories.jsonl"),
    "trackio": Format("trackio_traces", None, extra="trackio"),
}


def named_episodes(run: OpenRun, iterations: Sequence[int]) -> Iterator[NamedEpisode]:
    """The episodes of these iterations, in order."""
    for iteration in iterations:
        for place, group in enumerate(run.groups(iteration)):
            for member in range(len(group.episodes)):
                yield NamedEpisode(group, place, member)
