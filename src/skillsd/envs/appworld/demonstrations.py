"""Demonstrations for the warm start: reference solutions of the training tasks, with the engine's real outputs.

Solutions are played once and recorded in the cache folder (never in the repository: AppWorld's terms don't allow
publishing transcripts unencrypted). They teach a base model the format of a turn, the names of the APIs, and how to
follow a skill in its prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from skillsd.cache import cache
from skillsd.envs.appworld.data import World, scenario_of
from skillsd.envs.appworld.paths import VERSION, python_version
from skillsd.envs.appworld.prompt import Style, turn_text
from skillsd.envs.appworld.summarise import summarise_turns
from skillsd.envs.base import Step
from skillsd.envs.demonstration_options import check_share, chosen
from skillsd.envs.hosts import HostBrokenError
from skillsd.errors import UserError
from skillsd.seeds import derive_seed
from skillsd.types import TRAIN_SPLIT, Demonstration, DemonstrationTurn, Message, Skill, Task

Play = Callable[[Task, Sequence[str]], Awaitable[list[Step]]]
"""Plays a task with these actions in the engine, until they or the episode end; returns the steps."""

SAVE_EVERY = 10
"""Episodes between saves, so that an interrupted recording can resume."""

MAX_ATTEMPTS = 3
"""Attempts to play a reference solution successfully."""

_OUTPUT_SOURCES = ("host/*.py", "client.py", "environment.py", "prompt.py")
"""Sources that determine an episode's outputs. A change to them invalidates the recordings."""


@dataclass(frozen=True)
class Recording:
    """A played reference solution: the actions and the resulting steps, one per action."""

    task: Task
    actions: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def success(self) -> bool:
        return bool(self.steps) and self.steps[-1].success

    def skill(self, style: Style) -> Skill | None:
        """The rule-based summariser's skill for this episode, or None."""
        return summarise_turns([step.info for step in self.steps], self.success, style)


@dataclass(frozen=True)
class Options:
    """Composition of the demonstrations. Shares are in [0, 1].

    Attributes:
        skill_share: share of all demonstrations that have a skill in the prompt: the rule-based summariser's skill for
            a reference solution. Scenarios selected by `guided_only` are added to it.
        same_task_share: of these, the share whose skill comes from the same task. The others use another instance of
            the scenario, if there is one, so that the model learns to follow steps instead of copying them.
        guided_only: share of the scenarios that are only shown with a skill. On these the student stays weak without
            a skill and the teacher, which has one, is strong: the gap that Skill-SD closes.
        difficulties: use only tasks of these difficulties; None for all.
    """

    skill_share: float = 0.5
    same_task_share: float = 0.25
    guided_only: float = 0.0
    difficulties: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("skill_share", "same_task_share", "guided_only"):
            check_share(name, getattr(self, name))
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
    """The infinite stream, each training task once per epoch; deterministic given the arguments. See `Options`.

    Missing recordings are made first, in a new event loop.

    Raises:
        UserError: for a split other than ``train``, an unknown option, an invalid value, or if no task has a reference
            solution that succeeds in the engine.
    """
    if split != TRAIN_SPLIT:
        raise UserError(f"demonstrations are for the split {TRAIN_SPLIT!r} only; got {split!r}")
    taken = chosen(Options, options)
    path = recording_path(rules)
    recordings = [
        recording
        for recording in asyncio.run(record(world, play, style, path))
        if recording.success and _wanted(recording.task, taken)
    ]
    if not recordings:
        raise UserError(
            f"no demonstrations: no task of {TRAIN_SPLIT!r} in {str(world.root)!r}"
            + (f" of difficulty {', '.join(map(str, taken.difficulties))}" if taken.difficulties else "")
            + " has a reference solution that solves it. Use other tasks, or skip the warm start."
        )
    return _stream(recordings, prompt, style, seed, taken)


def recording_path(rules: Mapping[str, Any]) -> Path:
    """The recording's file for episodes under these rules; `rules` also identify the world."""
    here = Path(__file__).parent
    sources = [
        hashlib.sha256(file.read_bytes()).hexdigest() for glob in _OUTPUT_SOURCES for file in sorted(here.glob(glob))
    ]
    key = [VERSION, python_version(), sources, dict(rules)]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache() / "appworld-recordings" / f"{name}.json"


async def record(world: World, play: Play, style: Style, path: Path) -> list[Recording]:
    """The recorded reference solutions of the training tasks, in the order of the tasks.

    Solutions that `path` doesn't have, or that have changed since, are played (up to `MAX_ATTEMPTS` times, until one
    attempt succeeds) and saved. Waits for another process that is recording to the same file.

    Raises:
        UserError: if the infrastructure fails in every attempt.
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
        saved = _load(path)
        missing = [task for task in tasks if task.id in actions and not _is_recorded(saved, task.id, actions[task.id])]
        unsaved = 0
        if missing:
            print(f"recording {len(missing)} reference solutions in AppWorld, about a second each ...", file=sys.stderr)
        try:
            for task in missing:
                steps = await solved(play, task, actions[task.id])
                if not steps:
                    continue  # possibly a slow machine: the next run tries again
                # Converted to JSON and back, so that the first run gets the same values as later ones.
                entry = {"actions": actions[task.id], "steps": [asdict(step) for step in steps]}
                saved[task.id] = json.loads(json.dumps(entry))
                unsaved += 1
                if unsaved == SAVE_EVERY:
                    _save(path, saved)
                    unsaved = 0
        finally:
            if unsaved:
                _save(path, saved)
    recordings = []
    for task in tasks:
        if task.id in actions and _is_recorded(saved, task.id, actions[task.id]):
            recorded = tuple(Step(**step) for step in saved[task.id]["steps"])
            recordings.append(Recording(task, tuple(actions[task.id][: len(recorded)]), recorded))
    return recordings


async def solved(play: Play, task: Task, actions: Sequence[str]) -> list[Step]:
    """The steps of an episode that solves the task; empty if none of `MAX_ATTEMPTS` attempts does.

    Raises:
        UserError: if the infrastructure fails in every attempt.
    """
    broken: HostBrokenError | None = None
    for _ in range(MAX_ATTEMPTS):
        try:
            steps = await play(task, actions)
        except HostBrokenError as error:
            broken = error
            continue
        if steps and steps[-1].success:
            return steps
        broken = None
    if broken is not None:
        raise UserError(f"AppWorld failed on the task {task.id!r} in {MAX_ATTEMPTS} attempts: {broken}") from broken
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
    # The selection doesn't depend on the seed: with another seed, the same scenarios must stay guided-only.
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
                same_task = not others or rng.random() < options.same_task_share
                skill = (recording if same_task else rng.choice(others)).skill(style)
            turns = tuple(
                DemonstrationTurn(action, step.observation)
                for action, step in zip(recording.actions, recording.steps, strict=True)
            )
            yield Demonstration(recording.task, prompt(recording.task), turns, skill)


def _wanted(task: Task, options: Options) -> bool:
    return options.difficulties is None or task.payload["difficulty"] in options.difficulties


def _load(path: Path) -> dict[str, Any]:
    """The saved recordings; empty if the file is missing or unreadable."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


def _save(path: Path, recordings: Mapping[str, Any]) -> None:
    """Write atomically, so that readers never see a partial file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(recordings), encoding="utf-8")
    os.replace(temporary, path)


def _is_recorded(saved: Mapping[str, Any], task_id: str, actions: Sequence[str]) -> bool:
    entry = saved.get(task_id)
    return isinstance(entry, dict) and entry.get("actions") == list(actions) and isinstance(entry.get("steps"), list)
