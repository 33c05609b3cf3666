"""The rule-based summariser: turns a finished episode into a skill, using only the ``info`` of its turns.

A skill has the commands that scored, those that the game refused, and the way that was found. It never searches for a
better one: a skill contains only what the student found itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from skillsd.envs.textgames.prompt import Style, written
from skillsd.types import Skill, Trajectory

MAX_ANSWER_CHARS = 60
"""Length of a game's answer in a skill."""
MAX_REFUSED = 4
"""Maximum number of refused commands in a skill. The first ones: models repeat them."""
MAX_SCORED = 12
"""Maximum number of scoring commands in a skill's analysis."""
MAX_STEPS = 80
"""Maximum number of commands in a workflow: longer ones would not fit into a teacher's prompt."""

_MOVES = re.compile(r"(move (north|south|east|west)|go (to )?.+|look around|inventory)")
"""Commands that change nothing but the player's place."""
_READS = re.compile(r"(look|inventory|examine|read|task)\b")


def summariser(style: Style) -> Callable[[Trajectory], Skill | None]:
    """The summariser for a prompt style: ``react`` fills all fields, ``words`` only the workflow."""

    def summarise(trajectory: Trajectory) -> Skill | None:
        return summarise_turns([turn.info for turn in trajectory.turns], trajectory.success, style)

    return summarise


def summarise_turns(infos: Sequence[Mapping[str, Any]], success: bool, style: Style) -> Skill | None:
    """The skill for an episode with these turns; None if there is nothing to report."""
    steps = [info for info in infos if info["command"]]
    found = path(steps if success else _until_the_last_score(steps), style)
    if style == "words":
        skill = Skill("", "", workflow(found, style))
    else:
        start = "" if success or not found else "A start, the rest has to be found out: "
        plan = start + workflow(found, style) if found else ""
        skill = Skill(_success(steps, success), _mistakes(infos, success), plan)
    return None if skill.is_empty else skill


def workflow(commands: Sequence[str], style: Style) -> str:
    """Commands as the text of a golden workflow."""
    commands = commands[:MAX_STEPS]
    return " ".join(written(style, command) for command in commands) if style == "words" else "; ".join(commands)


def _until_the_last_score(steps: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    scoring = [place for place, info in enumerate(steps) if info["score"] > info["before"]]
    return steps[: scoring[-1] + 1] if scoring else []


def path(steps: Iterable[Mapping[str, Any]], style: Style) -> list[str]:
    """The commands of an episode without refused ones, repeated reading, and walks that end where they began.

    In the style ``words``, without all that changed nothing: a tiny model follows commands and draws no conclusions.
    """
    kept: list[Mapping[str, Any]] = []
    for info in steps:
        idle = info["places"][0] == info["places"][1] and info["score"] == info["before"]
        again = _READS.match(info["command"]) and info["command"] in (other["command"] for other in kept)
        if info["refused"] or again or (idle and style == "words"):
            continue
        kept.append(info)
        for start in range(len(kept) - 1, -1, -1):
            if not _MOVES.fullmatch(kept[start]["command"]) or kept[start]["score"] != kept[start]["before"]:
                break
            if len(kept) - start > 1 and kept[start]["places"][0] == info["places"][1]:
                del kept[start:]
                break
    return [info["command"] for info in kept]


def _success(steps: Sequence[Mapping[str, Any]], success: bool) -> str:
    scored = [f"{i['command']} (+{i['score'] - i['before']:.2f})" for i in steps if i["score"] > i["before"]]
    parts = [f"Scored: {'; '.join(scored[:MAX_SCORED])}."] if scored else []
    if success:
        parts.append(f"The task was done with {len(steps)} commands.")
    return " ".join(parts)


def _mistakes(infos: Sequence[Mapping[str, Any]], success: bool) -> str:
    refused = {info["command"]: info["answer"] for info in reversed(infos) if info["refused"] and info["command"]}
    listed = [f'{command} ("{answer}")' for command, answer in reversed(refused.items())]
    parts = [f"Refused: {'; '.join(listed[:MAX_REFUSED])}."] if listed else []
    if unread := sum(info["command"] is None for info in infos):
        parts.append(f"{unread} answers had no command.")
    last = infos[-1] if infos else None
    if last and not success and last["ended"]:
        parts.append(f"The game was lost with: {last['command']}.")
    elif last and not success:
        parts.append(f"The turns ran out at a score of {last['score']:.2f}.")
    return " ".join(parts)
