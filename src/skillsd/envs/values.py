"""Checks on the values that environments hand in.

Each returns the value in Python's own types, or raises `InvalidError`. Numbers and booleans of numpy and torch are
converted; anything else that does not fit is refused. A run (`skillsd.envs.checked`) and the conformance kit
(`skillsd.envs.conformance`) apply the same checks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, get_args

from skillsd.envs.base import Step
from skillsd.types import TRAIN_SPLIT, Demonstration, DemonstrationTurn, Message, Role, Skill, Task, Tool

ROLES = get_args(Role)


class InvalidError(ValueError):
    """A value that does not fit the contract of `skillsd.envs.base`.

    Attributes:
        check: what was checked, e.g. ``reward``; a name that is stable across versions.
        expected, found: in words.
    """

    def __init__(self, check: str, expected: str, found: object, where: str = "") -> None:
        self.check, self.expected, self.found = check, expected, _shown(found)
        self.where = where or check
        super().__init__(f"{self.where} is {self.found}, expected {expected}")


# -- single values --------------------------------------------------------------------------------------------------


def text(value: object, check: str, where: str = "", *, empty: bool = True) -> str:
    """A string that can be encoded: tokenizers refuse lone surrogates."""
    expected = "text" if empty else "text that is not empty"
    if not isinstance(value, str) or not (value or empty):
        raise InvalidError(check, expected, value, where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidError(check, "text in valid Unicode (it has half a surrogate pair)", value, where) from None
    return value if type(value) is str else str.__str__(value)


def number(value: object, check: str, where: str = "", *, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from `low` to `high`."""
    expected = "a finite number" if math.isinf(low) else f"a number from {low:g} to {high:g}"
    found = _scalar(value)
    if not isinstance(found, Real):
        raise InvalidError(check, expected, value, where)
    try:
        converted = float(found)
    except (OverflowError, ValueError):
        converted = math.inf
    if not (math.isfinite(converted) and low <= converted <= high):
        raise InvalidError(check, expected, value, where)
    return converted


def count(value: object, check: str) -> int:
    """A positive integer."""
    found = _scalar(value)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise InvalidError(check, "a positive integer", value)
    return int(found)


def boolean(value: object, check: str) -> bool:
    """True or False; 0 and 1 are accepted."""
    found = _scalar(value)
    if not isinstance(found, int) or found not in (0, 1):
        raise InvalidError(check, "True or False", value)
    return bool(found)


def json_object(value: object, check: str) -> Mapping[str, Any]:
    """A mapping that can be written as JSON. (NaN and infinities are not JSON.)"""
    if not isinstance(value, Mapping):
        raise InvalidError(check, "a mapping that can be written as JSON", value)
    try:
        json.dumps(value, allow_nan=False)
        return value
    except (TypeError, ValueError, RecursionError):
        pass  # it may become JSON once its numpy scalars are converted
    try:
        converted: Mapping[str, Any] = _plain(value, check, check)
        json.dumps(converted, allow_nan=False)
    except InvalidError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidError(check, f"JSON ({error})", value) from None
    return converted


def texts(value: object, check: str, where: str = "") -> tuple[str, ...]:
    """Several texts: not a single string, which would pass as a sequence of its characters."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidError(check, "a sequence of texts", value, where)
    return tuple(text(item, check, f"{where or check}[{place}]") for place, item in enumerate(value))


def _scalar(value: Any) -> Any:
    """A scalar of numpy or torch as Python's; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)) else value


def _plain(value: Any, check: str, where: str) -> Any:
    """`value` with Python's numbers inside."""
    value = _scalar(value)
    if isinstance(value, Mapping):
        return {_scalar(key): _plain(inner, check, f"{where}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, check, f"{where}[{place}]") for place, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidError(check, "JSON, which has no such number", value, where)
    if value is not None and not isinstance(value, str | int | float):
        hint = "JSON; convert it with .tolist()" if hasattr(value, "tolist") else "JSON"
        raise InvalidError(check, hint, value, where)
    return value


def _shown(value: object) -> str:
    """A value and its type for messages, in ASCII."""
    try:
        shown = ascii(value)
    except Exception:  # its own __repr__ fails
        shown = "(can't be shown)"
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return shown if value is None or type(value) in (bool, float) else f"{shown} ({type(value).__name__})"


def valid_unicode(value: Any) -> Any:
    """JSON with a replacement for each half of a surrogate pair: programs can print them, tokenizers refuse them."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [valid_unicode(item) for item in value]
    if isinstance(value, dict):
        return {valid_unicode(key): valid_unicode(item) for key, item in value.items()}
    return value


# -- an episode -----------------------------------------------------------------------------------------------------


def messages(value: object, check: str = "prompt") -> tuple[Message, ...]:
    """The first prompt: messages, at least one of them the user's, to which a skill can be added."""
    expected = "a sequence of Message, e.g. (Message('user', '...'),)"
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise InvalidError(check, expected, value)
    found = []
    for place, message in enumerate(value):
        where = f"{check}[{place}]"
        if not isinstance(message, Message):
            raise InvalidError(check, "a Message", message, where)
        if message.role not in ROLES:
            raise InvalidError(check, f"one of {', '.join(ROLES)}", message.role, f"{where}.role")
        content = text(message.content, check, f"{where}.content")
        found.append(message if content is message.content else dataclasses.replace(message, content=content))
    if not any(message.role == "user" for message in found):
        raise InvalidError(check, "a user message among them", [message.role for message in found], f"{check}'s roles")
    return tuple(found)


def step(value: object) -> Step:
    """The result of an action."""
    if not isinstance(value, Step):
        raise InvalidError("step", "a Step", value, "the result of step()")
    checked = Step(
        observation=text(value.observation, "observation", "the observation"),
        done=boolean(value.done, "done"),
        reward=number(value.reward, "reward", "the reward", low=0, high=1),
        success=boolean(value.success, "success"),
        info=json_object(value.info, "info"),
    )
    if checked.success and not (checked.done and checked.reward == 1):
        raise InvalidError("success", "done and a reward of 1 with success", value, "a Step")
    return checked


# kind -> key -> whether it may be missing or None; all are text but for rows and legend
_PICTURES = {
    "grid": {"rows": False, "legend": True, "caption": True},
    "code": {"input": False, "output": False, "error": True, "caption": True},
    "text": {"text": False, "caption": True},
}


def picture(value: object) -> Mapping[str, Any] | None:
    """What a turn looks like (`TaskSet.picture`), or None."""
    if value is None:
        return None
    found = json_object(value, "picture")
    keys = _PICTURES.get(str(found.get("kind")))
    if keys is None:
        raise InvalidError("picture", f"one of {', '.join(_PICTURES)}", found.get("kind"), "the picture's kind")
    if unknown := [key for key in found if key not in (*keys, "kind")]:
        raise InvalidError("picture", f"kind, {', '.join(keys)}", unknown[0], "a key of the picture")
    for key, optional in keys.items():
        given, where = found.get(key), f"the picture's {key}"
        if given is None and optional:
            continue
        if key == "rows":
            texts(given, "picture", where)
        elif key == "legend":
            legend = given if isinstance(given, Mapping) else {None: given}
            texts([part for pair in legend.items() for part in pair], "picture", where)
        else:
            text(given, "picture", where)
    return found


# -- a task set -----------------------------------------------------------------------------------------------------


def tasks(value: object, split: str) -> list[Task]:
    """The tasks of a split. Ids are unique, payloads JSON, difficulties finite."""
    where = f"tasks({split!r})"
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise InvalidError("tasks", "a sequence of Task", value, where)
    found: dict[str, Task] = {}
    for place, given in enumerate(value):
        checked = task(given, split, f"{where}[{place}]")
        if checked.id in found:
            raise InvalidError(
                "unique_ids", "an id that no other task of the split has", checked.id, f"{where}[{place}].id"
            )
        found[checked.id] = checked
    return list(found.values())


def task(value: object, split: str, where: str) -> Task:
    """A task of a split."""
    if not isinstance(value, Task):
        raise InvalidError("tasks", "a Task", value, where)
    changes: dict[str, Any] = {
        "id": text(value.id, "task_id", f"{where}.id", empty=False),
        "env": text(value.env, "task_env", f"{where}.env"),
        "split": text(value.split, "task_split", f"{where}.split"),
        "difficulty": number(value.difficulty, "difficulty", f"{where}.difficulty"),
    }
    if changes["split"] != split:
        raise InvalidError("task_split", repr(split), value.split, f"{where}.split")
    try:
        changes["payload"] = json_object(value.payload, "payload")
    except InvalidError as error:
        raise InvalidError(
            "payload", f"{error.expected} as the payload of {value.id!r}", value.payload, where
        ) from None
    changed = {name: new for name, new in changes.items() if new is not getattr(value, name)}
    return dataclasses.replace(value, **changed) if changed else value


def splits(value: object) -> tuple[str, ...]:
    """Names of splits."""
    names = texts(value, "splits")
    if not names or len(set(names)) < len(names):
        raise InvalidError("splits", "different names, at least one", value)
    return names


def skill(value: object, check: str, where: str) -> Skill | None:
    """A skill, or None."""
    if value is None:
        return None
    if not isinstance(value, Skill):
        raise InvalidError(check, "a Skill or None", value, where)
    names = [field.name for field in dataclasses.fields(Skill)]
    return Skill(**{name: text(getattr(value, name), check, f"{where}.{name}") for name in names})


def practice(value: object) -> tuple[Task, Skill]:
    """A training task and the skill that it needs."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise InvalidError("practice", "a pair (Task, Skill)", value, "the result of practice()")
    found = skill(value[1], "practice", "the practice task's skill")
    if found is None or found.is_empty:
        raise InvalidError("practice", "a Skill that is not empty", value[1], "the practice task's skill")
    return task(value[0], TRAIN_SPLIT, "the practice task"), found


def optional_text(value: object, check: str, where: str) -> str | None:
    """Text, or None."""
    return None if value is None else text(value, check, where)


def optional_function(value: object, check: str) -> Callable[..., Any] | None:
    """Something that can be called, or None."""
    if value is not None and not callable(value):
        raise InvalidError(check, "a function or None", value)
    return value


def demonstration(value: object) -> Demonstration:
    """A demonstration of the warm start."""
    check = "demonstrations"
    if not isinstance(value, Demonstration):
        raise InvalidError(check, "a Demonstration", value, "a demonstration")
    turns = []
    for place, turn in enumerate(value.turns):
        if not isinstance(turn, DemonstrationTurn):
            raise InvalidError(check, "a DemonstrationTurn", turn, f"a demonstration's turns[{place}]")
        action = text(turn.action, check, f"turns[{place}].action")
        observation = text(turn.observation, check, f"turns[{place}].observation")
        turns.append(DemonstrationTurn(action, observation, boolean(turn.learn, check)))
    if not turns:
        raise InvalidError(check, "at least one turn", value.turns, "a demonstration's turns")
    found = skill(value.skill, check, "a demonstration's skill")
    return dataclasses.replace(value, prompt=messages(value.prompt, check), turns=tuple(turns), skill=found)


def tools(value: object) -> tuple[Tool, ...]:
    """The tools of a task set, with different names."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidError("tools", "a sequence of Tool", value)
    found: dict[str, Tool] = {}
    for place, tool in enumerate(value):
        where = f"tools[{place}]"
        if not isinstance(tool, Tool):
            raise InvalidError("tools", "a Tool", tool, where)
        if not isinstance(tool.name, str) or not re.fullmatch(r"[\w./-]{1,128}", tool.name, re.ASCII):
            raise InvalidError("tools", "1 to 128 letters, digits, and . / - _", tool.name, f"{where}.name")
        if tool.name in found:
            raise InvalidError("tools", "another name for each tool", tool.name, f"{where}.name")
        description = text(tool.description, "tools", f"{where}.description")
        found[tool.name] = Tool(tool.name, description, json_object(tool.parameters, "tools"))
    return tuple(found.values())
