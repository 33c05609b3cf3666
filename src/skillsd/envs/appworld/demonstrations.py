"""Episodes to imitate in the warm start: the reference solutions of the train tasks, as the real engine answers them.

The engine is needed once: what it answered is kept in the cache folder (never in the repository: transcripts of
AppWorld may not be published in the clear). A base model has to learn how a turn is written, what the APIs are called
and how to follow a skill that stands in its prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from skillsd.cache import cache
from skillsd.envs.appworld.client import WorldBrokenError
from skillsd.envs.appworld.data import World, scenario_of
from skillsd.envs.appworld.paths import VERSION
from skillsd.envs.appworld.prompt import Style, turn_text
from skillsd.envs.appworld.summarise import summarise_turns
from skillsd.envs.base import Step
from skillsd.errors import UserError, unknown_name
from skillsd.seeds import derive_seed
from skillsd.types import TRAIN_SPLIT, Demonstration, DemonstrationTurn, Message, Skill, Task

Play = Callable[[Task, Sequence[str]], Awaitable[list[Step]]]
"""Plays a task with these actions in the engine, until they or the episode end; gives the answers."""

SAVE_EVERY = 10
"""Episodes after which a recording is saved, so that an interrupted one goes on from there."""

TRIES = 3
"""Episodes that a reference solution gets."""

_ANSWERING = ("host/*.py", "environment.py", "prompt.py")
"""The sources that shape what an episode answers: where they change, recordings are made anew."""


@dataclass(frozen=True)
class Recording:
    """A reference solution as it was played: its actions and the engine's answers, one for each."""

    task: Task
    actions: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def success(self) -> bool:
        return bool(self.steps) and self.steps[-1].success

    def skill(self, style: Style) -> Skill | None:
        """What the rules of `summarise` say of this episode; None if that is nothing."""
        return summarise_turns([step.info for step in self.steps], self.success, style)


@dataclass(frozen=True)
class Options:
    """What the stream of demonstrations is made of. All shares are in [0, 1].

    Attributes:
        skill_share: of all demonstrations, those with a skill in their prompt, as the rule-based summariser writes it
            of a reference solution. Those of `guided_only` come on top.
        same_task_share: of those, the ones whose skill is from the very task. The others' is from another instance
            of the scenario, where there is one: the steps are to be followed, not copied.
        guided_only: share of the scenarios that are never shown without a skill. There, the plain policy stays weak
            while the teacher, who reads skills, is strong: the gap that Skill-SD closes.
        difficulties: only tasks of these difficulties; None for all.
    """

    skill_share: float = 0.5
    same_task_share: float = 0.25
    guided_only: float = 0.0
    difficulties: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("skill_share", "same_task_share", "guided_only"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f"demonstrations: {name} is {value!r}; expected a share from 0 to 1")
        given = self.difficulties
        if given is not None and (
            isinstance(given, str)
            or not isinstance(given, Sequence)
            or not given
            or not all(isinstance(number, int) for number in given)
        ):
            raise UserError(f"demonstrations: difficulties is {given!r}; expected a list of numbers such as [1, 2]")


def demonstrate(
    world: World,
    play: Play,
    prompt: Callable[[Task], tuple[Message, ...]],
    *,
    split: str,
    seed: int,
    style: Style,
    rules: Mapping[str, Any],
    **options: Any,
) -> Iterator[Demonstration]:
    """The endless stream, every train task once an epoch; the same arguments give the same one. See `Options`.

    What is not recorded yet is recorded now, in an event loop of its own.

    Raises:
        UserError: for any split but ``train``, an unknown option or a bad value, or where no task has a solution that
            the engine takes for one.
    """
    if split != TRAIN_SPLIT:
        raise UserError(f"demonstrations are for the split {TRAIN_SPLIT!r} only; got {split!r}")
    known = [field.name for field in fields(Options)]
    for name in options:
        if name not in known:
            raise unknown_name("demonstrations option", name, known)
    chosen = Options(**options)
    path = recording_path(rules)
    recordings = [
        recording
        for recording in asyncio.run(record(world, play, style, path))
        if recording.success and _wanted(recording.task, chosen)
    ]
    if not recordings:
        raise UserError(
            f"no demonstrations: no task of {TRAIN_SPLIT!r} in {str(world.root)!r}"
            + (f" of difficulty {', '.join(map(str, chosen.difficulties))}" if chosen.difficulties else "")
            + " has a reference solution that solves it. Use other tasks, or leave the warm start out."
        )
    return _stream(recordings, prompt, style, seed, chosen)


def recording_path(rules: Mapping[str, Any]) -> Path:
    """Where the recording of episodes played by these rules is kept; `rules` identify the world too."""
    here = Path(__file__).parent
    sources = [hashlib.sha256(file.read_bytes()).hexdigest() for glob in _ANSWERING for file in sorted(here.glob(glob))]
    name = hashlib.sha256(json.dumps([VERSION, sources, dict(rules)], sort_keys=True).encode()).hexdigest()[:16]
    return cache() / "appworld-recordings" / f"{name}.json"


async def record(world: World, play: Play, style: Style, path: Path) -> list[Recording]:
    """The reference solutions of the train tasks as the engine answers them, in the tasks' order.

    Each is played until it solves its task, as far as `TRIES` go, and then kept: what `path` holds is taken from there,
    unless the solution has changed since. Another process that records into the same file is waited for.

    Raises:
        UserError: if the infrastructure breaks in every try.
    """
    tasks = world.tasks(TRAIN_SPLIT)
    solutions = {task.id: world.solution(task.id) for task in tasks}
    actions = {
        task_id: [turn_text(turn.thought, turn.code, style) for turn in turns]
        for task_id, turns in solutions.items()
        if turns
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        kept = _load(path)
        missing = [task for task in tasks if task.id in actions and not _holds(kept, task.id, actions[task.id])]
        unsaved = 0
        if missing:
            print(f"recording {len(missing)} reference solutions in AppWorld, about a second each ...", file=sys.stderr)
        try:
            for task in missing:
                steps = await solved(play, task, actions[task.id])
                if not steps:
                    continue  # a slow machine may have been why: it is tried again by the next run
                # Through JSON even now, so that the first run sees what later ones read.
                entry = {"actions": actions[task.id], "steps": [asdict(step) for step in steps]}
                kept[task.id] = json.loads(json.dumps(entry))
                unsaved += 1
                if unsaved == SAVE_EVERY:
                    _save(path, kept)
                    unsaved = 0
        finally:
            if unsaved:
                _save(path, kept)
    recordings = []
    for task in tasks:
        if task.id in actions and _holds(kept, task.id, actions[task.id]):
            steps_of = tuple(Step(**step) for step in kept[task.id]["steps"])
            recordings.append(Recording(task, tuple(actions[task.id][: len(steps_of)]), steps_of))
    return recordings


async def solved(play: Play, task: Task, actions: Sequence[str]) -> list[Step]:
    """The engine's answers in an episode that solved the task; none if none of `TRIES` did.

    Raises:
        UserError: if the infrastructure breaks in every try.
    """
    broken: WorldBrokenError | None = None
    for _ in range(TRIES):
        try:
            steps = await play(task, actions)
        except WorldBrokenError as error:
            broken = error
            continue
        if steps and steps[-1].success:
            return steps
        broken = None
    if broken is not None:
        raise UserError(f"AppWorld did not play the task {task.id!r} in {TRIES} tries: {broken}") from broken
    return []


def _stream(
    recordings: Sequence[Recording],
    prompt: Callable[[Task], tuple[Message, ...]],
    style: Style,
    seed: int,
    options: Options,
) -> Iterator[Demonstration]:
    rng = random.Random(derive_seed(seed, "appworld demonstrations"))
    scenarios: dict[str, list[Recording]] = {}
    for recording in recordings:
        scenarios.setdefault(scenario_of(recording.task.id), []).append(recording)
    # The same scenarios whatever the seed is: another one must not show them after all.
    ranked = sorted(scenarios, key=lambda scenario: derive_seed("guided only", scenario))
    guided_only = set(ranked[: round(options.guided_only * len(ranked))])
    order = list(recordings)
    while True:
        rng.shuffle(order)
        for recording in order:
            scenario = scenario_of(recording.task.id)
            skill = None
            if scenario in guided_only or rng.random() < options.skill_share:
                others = [other for other in scenarios[scenario] if other is not recording]
                itself = not others or rng.random() < options.same_task_share
                skill = (recording if itself else rng.choice(others)).skill(style)
            turns = tuple(
                DemonstrationTurn(action, step.observation)
                for action, step in zip(recording.actions, recording.steps, strict=True)
            )
            yield Demonstration(recording.task, prompt(recording.task), turns, skill)


def _wanted(task: Task, options: Options) -> bool:
    return options.difficulties is None or task.payload["difficulty"] in options.difficulties


def _load(path: Path) -> dict[str, Any]:
    """What is recorded already; nothing, if the file is not there or cannot be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _save(path: Path, kept: Mapping[str, Any]) -> None:
    """All at once: a reader never meets half a file."""
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps(kept), encoding="utf-8")
    os.replace(half, path)


def _holds(kept: Mapping[str, Any], task_id: str, actions: Sequence[str]) -> bool:
    entry = kept.get(task_id)
    return isinstance(entry, dict) and entry.get("actions") == list(actions) and isinstance(entry.get("steps"), list)
