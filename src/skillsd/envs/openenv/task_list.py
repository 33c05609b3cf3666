"""The splits of an OpenEnv server: its own ones, or resets that the recipe lists."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from skillsd.envs.openenv.api import Api
from skillsd.errors import UserError
from skillsd.types import Task

EXAMPLE = "{train: {seeds: 0-199}, test: {seeds: 100000-100099}}"


@dataclass(frozen=True)
class Split:
    """Where the tasks of a split come from: a split of the server, or a range of seeds.

    Attributes:
        theirs: the name of the server's split; None for seeds.
        seeds: of the resets.
        reset: further data of each reset.
    """

    theirs: str | None = None
    seeds: range = range(0)
    reset: Mapping[str, Any] = field(default_factory=dict)


def read(given: object) -> dict[str, Split]:
    """The option ``splits``: name -> the server's name, or a mapping with ``seeds`` or ``split``, and further data.

    Raises:
        UserError: if it is no such mapping, or a seed is in two splits.
    """
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"environment.options.splits is {given!r}: expected a mapping of names, e.g. {EXAMPLE}")
    found = {str(name): _split(str(name), value) for name, value in given.items()}
    names = list(found)
    for place, one in enumerate(names):
        for other in names[:place]:
            if common := _common(found[one], found[other]):
                raise UserError(f"{common} is in the splits {other!r} and {one!r}: held-out tasks must be other ones")
    return found


def tasks(name: str, split: Split, api: Api, env: Callable[[], str], kind: str) -> list[Task]:
    """The tasks of a split, easy ones first if the server gives their difficulty.

    Args:
        name: our name of the split.
        env: the environment's name on the server.
        kind: ``Task.env``.
    """
    if split.theirs is None:
        resets = [{"seed": seed, **split.reset} for seed in split.seeds]
        return [Task(_id(reset), kind, name, {"reset": reset}) for reset in resets]
    listed = api.tasks(env(), split.theirs)
    found = [_task(name, split, kind, place, said) for place, said in enumerate(listed)]
    return sorted(found, key=lambda task: task.difficulty)


def distinct(split_tasks: Mapping[str, list[Task]]) -> None:
    """Check that no task is in two splits.

    Raises:
        UserError: if one is.
    """
    owner: dict[str, str] = {}
    for name, found in split_tasks.items():
        for task in found:
            if (other := owner.setdefault(task.id, name)) != name:
                raise UserError(
                    f"the server lists the task {task.id!r} in the splits {other!r} and {name!r}: held-out tasks must "
                    "be other ones. Choose splits that share none: environment.options.splits"
                )


def _split(name: str, given: object) -> Split:
    if isinstance(given, str):
        return Split(given)
    where = f"environment.options.splits.{name} is {given!r}"
    if not isinstance(given, Mapping) or ("seeds" in given) == ("split" in given):
        raise UserError(f"{where}: expected the name of a split of the server, or seeds, e.g. {{seeds: 0-199}}")
    reset = {str(key): value for key, value in given.items() if key not in ("seeds", "split")}
    if "split" in given:
        return Split(str(given["split"]), reset=reset)
    bounds = re.fullmatch(r"(\d+)-(\d+)", str(given["seeds"]))
    if bounds is None or int(bounds[1]) > int(bounds[2]):
        raise UserError(f"{where}: expected the first and the last seed, e.g. seeds: 0-199")
    return Split(None, range(int(bounds[1]), int(bounds[2]) + 1), reset)


def _common(one: Split, other: Split) -> str:
    """What two splits share, in words."""
    if one.theirs is not None or other.theirs is not None:
        return f"the server's split {one.theirs!r}" if one.theirs == other.theirs and one.reset == other.reset else ""
    shared = range(max(one.seeds.start, other.seeds.start), min(one.seeds.stop, other.seeds.stop))
    return f"the seed {shared[0]}" if shared and one.reset == other.reset else ""


def _task(name: str, split: Split, kind: str, place: int, said: Any) -> Task:
    """A task that the server lists."""
    about = said if isinstance(said, dict) else {}
    index = about.get("index", place)
    given = about.get("id")
    # An id that only numbers the tasks of a split says nothing of their content.
    named = given is not None and str(given) not in (str(index), str(place))
    reset = {"split": split.theirs, "index": index, **split.reset}
    difficulty = about.get("difficulty")
    return Task(
        id=str(given) if named else f"{split.theirs}-{index}",
        env=kind,
        split=name,
        payload={"reset": reset},
        difficulty=float(difficulty) if isinstance(difficulty, int | float) else 0.0,
    )


def _id(reset: Mapping[str, Any]) -> str:
    """The seed, with a hash of the further data."""
    content = json.dumps({key: value for key, value in reset.items() if key != "seed"}, sort_keys=True, default=str)
    return f"seed-{reset['seed']}" + (f"-{hashlib.sha256(content.encode()).hexdigest()[:8]}" if len(reset) > 1 else "")
