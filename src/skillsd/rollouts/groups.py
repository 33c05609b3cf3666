"""The groups of an iteration as they were trained on: ``trajectories/iteration-N.jsonl.gz``, a group per line.

Numbers per token have four decimals, which keeps the files small. Checkpoints hold exact trajectories of their own
(`skillsd.rollouts.records`).
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from skillsd.errors import UserError
from skillsd.files.read import DamagedError, read_compressed_lines
from skillsd.files.write import make_folder, replacing
from skillsd.rollouts.records import FORMAT as TRAJECTORY_FORMAT
from skillsd.rollouts.records import trajectory_from_json, trajectory_to_json
from skillsd.types import Task, Trajectory

FORMAT = 1
DECIMALS = 4
_SUFFIX = ".jsonl.gz"
_REMEDY = "restore the file from a copy, or remove it"


@dataclass(frozen=True)
class RecordedEpisode:
    """An episode as it was trained on. Values per token are those of its action tokens, in order, ``[action tokens]``.

    Attributes:
        trajectory: its log-probs (of the policy that sampled) are rounded once it has been written.
        advantage: A_i.
        teacher_logprobs: log q; None without a teacher.
        student_logprobs: log pi when the update first trained on the token; None if the engine did not report them.
        rescored_logprobs: log pi_old by the learner, with ``objective.importance_cap`` only.
        divergence: the value of L_SDL's estimator; None without a teacher, with a lambda of 0, or if it is not known of
            all tokens (``objective.distil_clamp``).
    """

    trajectory: Trajectory
    advantage: float
    teacher_logprobs: tuple[float, ...] | None = None
    student_logprobs: tuple[float, ...] | None = None
    rescored_logprobs: tuple[float, ...] | None = None
    divergence: tuple[float, ...] | None = None

    @property
    def old_logprobs(self) -> tuple[float, ...]:
        """log pi_old of the action tokens, as the sampler reported it."""
        t = self.trajectory
        return tuple(p for p, sampled in zip(t.logprobs, t.action_mask, strict=True) if sampled)

    @property
    def gaps(self) -> tuple[float, ...] | None:
        """log q - log pi, the teacher's log-prob minus the student's (-l_t); None if one of them is unknown."""
        if self.teacher_logprobs is None or self.student_logprobs is None:
            return None
        return tuple(q - p for q, p in zip(self.teacher_logprobs, self.student_logprobs, strict=True))

    def by_turn(self, values: Sequence[float] | None) -> list[Sequence[float] | None]:
        """Values of the action tokens, ``[action tokens]``, by turn; Nones for None."""
        t = self.trajectory
        if values is None:
            return [None] * len(t.turns)
        before = [0, *accumulate(t.action_mask)]  # action tokens before each place
        return [values[before[turn.start] : before[turn.end]] for turn in t.turns]


@dataclass(frozen=True)
class RecordedGroup:
    """A group as it was trained on. Its prompts are those of its first episode.

    Attributes:
        iteration: from 1.
        context: what was available for the teacher's or the student's prompt: ``skill``, ``oracle`` (the reference
            solution), or None.
        skill_id: the skill's id in the bank.
        context_text: the text that was added to a prompt; None without one, or if it was too long.
        teacher_prompt: with special tokens; None if the teacher was not asked.
        teacher_prompt_length: in tokens.
        student_prompt: the prompt that the student was trained under.
        student_prompt_length: in tokens.
        taught: whether the teacher's log-probs were used.
        untaught: why not, if the method has a teacher.
        minibatch: its number in the first epoch, from 0; None for a group without tokens.
        applied: whether the optimiser's step of this minibatch was applied; it is not if something was not finite.
        episodes: in the order in which the group was sampled.
        imitated: the task's best success, which self-imitation trains on; it may be of an earlier iteration.
        token_texts: the text of each sampled id.
    """

    iteration: int
    task: Task
    context: str | None
    skill_id: int | None
    context_text: str | None
    teacher_prompt: str | None
    teacher_prompt_length: int | None
    student_prompt: str
    student_prompt_length: int
    taught: bool
    untaught: str | None
    minibatch: int | None
    applied: bool
    episodes: tuple[RecordedEpisode, ...]
    imitated: RecordedEpisode | None = None
    token_texts: Mapping[int, str] = field(default_factory=dict)

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        return tuple(episode.trajectory for episode in self.episodes)

    @property
    def rewards(self) -> list[float]:
        return [trajectory.reward for trajectory in self.trajectories]


# -- files ----------------------------------------------------------------------------------------------------------


def write_groups(folder: Path, iteration: int, groups: Iterable[RecordedGroup]) -> None:
    """Write an iteration's groups into the folder of a run's trajectories.

    Raises:
        WriteFailedError: if the file can't be written.
    """
    make_folder(folder)
    lines = "".join(json.dumps(group_to_json(group), separators=(",", ":")) + "\n" for group in groups)
    with replacing(folder / f"iteration-{iteration:05d}{_SUFFIX}") as aside:
        aside.write_bytes(gzip.compress(lines.encode(), 6, mtime=0))  # no time: the same bytes again


def read_groups(folder: Path, iteration: int) -> Iterator[RecordedGroup]:
    """The groups of an iteration.

    Raises:
        DamagedError: if the file or a record in it is damaged.
        UserError: if the iteration was not written, or has the format of an earlier version.
    """
    path = folder / f"iteration-{iteration:05d}{_SUFFIX}"
    if not path.is_file():
        if path.with_suffix("").is_file():
            raise UserError(
                f"{str(path.with_suffix(''))!r} has an earlier version's format, which this version does not read: use "
                "the version in manifest.json, or train again"
            )
        known = ", ".join(map(str, written_iterations(folder))) or "none"
        raise UserError(f"{str(folder.parent)!r} has no trajectories of iteration {iteration}; it has: {known}")
    for place, record in read_compressed_lines(path, _REMEDY):
        try:
            yield group_from_json(record)
        except ValueError as error:
            raise DamagedError(path, f"is damaged (line {place}: {error})", _REMEDY) from error


def written_iterations(folder: Path) -> list[int]:
    """The iterations whose groups are in the folder, ascending; those in an earlier version's format included."""
    names = {path.name.removesuffix(".gz") for path in folder.glob("iteration-*.jsonl*")}
    numbers = (name.removeprefix("iteration-").removesuffix(".jsonl") for name in names)
    return sorted(int(number) for number in numbers if number.isdecimal())


# -- JSON -----------------------------------------------------------------------------------------------------------

_PER_TOKEN = ("teacher_logprobs", "student_logprobs", "rescored_logprobs", "divergence")
_ALSO = ("episodes", "imitated", "task", "token_texts")
_PLAIN = tuple(item.name for item in fields(RecordedGroup) if item.name not in _ALSO)


def group_to_json(group: RecordedGroup) -> dict[str, Any]:
    """A record of plain dicts, lists, numbers and strings."""
    task, prompt = group.task, group.trajectories[0].prompt if group.episodes else ()
    imitated = group.imitated
    return {
        "format": FORMAT,
        **{name: getattr(group, name) for name in _PLAIN},
        "task": {item.name: getattr(task, item.name) for item in fields(task)},
        "prompt": [{"role": message.role, "content": message.content} for message in prompt],
        "token_texts": {str(token): text for token, text in group.token_texts.items()},
        "episodes": [_episode_to_json(episode, prompt) for episode in group.episodes],
        "imitated": None if imitated is None else _episode_to_json(imitated, prompt),
    }


def _episode_to_json(episode: RecordedEpisode, prompt: Sequence[Any]) -> dict[str, Any]:
    record = trajectory_to_json(episode.trajectory)
    del record["format"], record["task"]
    if episode.trajectory.prompt == prompt:
        del record["prompt"]
    record["logprobs"] = [_rounded(p) for p in episode.old_logprobs]
    record["advantage"] = _rounded(episode.advantage)
    for name in _PER_TOKEN:
        values = getattr(episode, name)
        if values is not None:
            record[name] = [_rounded(value) for value in values]
    return record


def _rounded(value: float) -> float | str:
    """JSON has no nan and no infinities: they are written as text."""
    return round(value, DECIMALS) + 0.0 if math.isfinite(value) else str(value)  # + 0.0: no -0.0


def group_from_json(record: Mapping[str, Any]) -> RecordedGroup:
    """The group that `group_to_json` wrote.

    Raises:
        ValueError: if the record is of another format, or something in it is missing, unknown or wrong.
    """
    given = record.get("format") if isinstance(record, Mapping) else type(record).__name__
    if given != FORMAT:
        raise ValueError(f"not a group's record: format is {given!r}, expected {FORMAT}")
    try:
        task, imitated = Task(**record["task"]), record["imitated"]
        episodes = [_episode_from_json(episode, record) for episode in record["episodes"]]
        group = RecordedGroup(
            **{name: record[name] for name in _PLAIN},
            task=episodes[0].trajectory.task if episodes else task,
            episodes=tuple(episodes),
            imitated=None if imitated is None else _episode_from_json(imitated, record),
            token_texts={int(token): text for token, text in record["token_texts"].items()},
        )
        _check(group)
        return group
    except KeyError as error:
        raise ValueError(f"not a group's record: {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a group's record: {error}") from error


def _episode_from_json(episode: Mapping[str, Any], group: Mapping[str, Any]) -> RecordedEpisode:
    record = {"prompt": group["prompt"], **episode, "task": group["task"], "format": TRAJECTORY_FORMAT}
    advantage = float(record.pop("advantage"))
    values = {name: tuple(map(float, record.pop(name))) for name in _PER_TOKEN if name in record}
    marks, sampled = record["action_mask"], record["logprobs"]
    if any(len(column) != sum(marks) for column in (sampled, *values.values())):
        raise ValueError(f"the values per token do not fit {sum(marks)} action tokens")
    logprobs = iter(sampled)
    record["logprobs"] = [next(logprobs) if marked else 0.0 for marked in marks]
    return RecordedEpisode(trajectory_from_json(record), advantage, **values)


def _check(group: RecordedGroup) -> None:
    """Raise ValueError if a value has another type."""
    g = group
    texts = [g.student_prompt, *g.token_texts.values()]
    texts += [x for x in (g.context, g.context_text, g.teacher_prompt, g.untaught) if x is not None]
    numbers = [g.iteration, g.student_prompt_length]
    numbers += [x for x in (g.skill_id, g.teacher_prompt_length, g.minibatch) if x is not None]
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("something that is text or a whole number has another type")
    if type(g.taught) is not bool or type(g.applied) is not bool:
        raise ValueError("taught or applied is not true or false")
