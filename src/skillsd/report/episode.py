"""A recorded episode for the terminal: turn by turn, with the gap between teacher and student at each action.

The words of models and environments are hostile input: control characters, with which a text could command the terminal
or reorder a line, are shown as escapes.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from skillsd.rollouts.groups import RecordedEpisode, RecordedGroup
from skillsd.types import Turn

Picture = Callable[[int | None], Mapping[str, Any] | None]
"""Turn, or None for the start -> its picture, see `TaskSet.picture`."""

TEACHER_HIGHER, TEACHER_LOWER, NEUTRAL = (59, 130, 246), (234, 88, 12), (128, 128, 128)
"""Blue and orange, which colour-blind people tell apart, and grey (RGB)."""

CELLS = {"wall": "bright_black", "box": "yellow", "box on target": "bold green", "target": "green", "floor": ""}
PLAYER = "bold cyan"
LONGEST = 4000
"""Characters of one text that are shown."""


def episode_text(group: RecordedGroup, member: int, picture: Picture, *, whole: bool = False) -> Iterator[Text]:
    """The lines of an episode.

    Args:
        member: its number in the group, from 0.
        whole: don't shorten texts of more than `LONGEST` characters.
    """
    episode = group.episodes[member]
    t = episode.trajectory
    longest = None if whole else LONGEST
    yield Text(
        f"task {visible(t.task.id)} (difficulty {t.task.difficulty:g}): {t.outcome}, reward {t.reward:.2f}, advantage "
        f"{episode.advantage:+.2f}, {len(t.turns)} turns, {t.action_tokens} sampled tokens"
    )
    yield Text(_teaching(group))
    if not group.applied:
        yield Text("not trained on: nothing was sampled, or the step was refused as not finite")
    if group.context_text:
        yield from _block("context", group.context_text, longest)
    if episode.gaps is not None:
        yield Text.assemble(
            "gap: log-prob of the action, teacher minus student; ",
            ("likelier under the teacher (+)", _colour(9)),
            ", ",
            ("less likely (-)", _colour(-9)),
        )
    for message in t.prompt:
        yield from _block(message.role, message.content, longest)
    yield from _drawn(picture(None), "", longest)
    for number, (turn, of_turn) in enumerate(zip(t.turns, episode.by_turn(episode.gaps), strict=True)):
        yield _action(number, turn, group, episode, of_turn, longest)
        yield from _drawn(picture(number), turn.observation, longest)


def visible(text: str, longest: int | None = None) -> str:
    """The text with control characters, bidirectional ones too, as escapes, and at most `longest` characters of it."""
    left = 0 if longest is None else len(text) - longest
    shown = text[:longest] + (f" ... ({left:,} more characters: --full)" if left > 0 else "")
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else ascii(c)[1:-1] for c in shown)


def gap_of(values: Sequence[float] | None) -> str:
    """A sum of log-prob differences with its sign; ``-`` if unknown."""
    return "-" if values is None else f"{round(math.fsum(values), 2) + 0.0:+.2f}"


def _teaching(group: RecordedGroup) -> str:
    what = f"skill {group.skill_id}" if group.context == "skill" else "reference solution" if group.context else ""
    if group.taught:
        return f"teacher: with {what} in its prompt" if what else "teacher: under the plain prompt"
    if group.untaught:
        return f"no teacher: {group.untaught}"
    return f"no teacher; {what} in the student's prompt" if what else "no teacher in this method"


def _action(
    number: int,
    turn: Turn,
    group: RecordedGroup,
    episode: RecordedEpisode,
    gaps: Sequence[float] | None,
    longest: int | None,
) -> Text:
    """The line of an action: the tokens in colour, and the sum of their gaps."""
    line = Text.assemble(f"\n{number + 1:>3}  ")
    ids = episode.trajectory.tokens[turn.start : turn.end]
    if gaps is None or len(gaps) != len(ids):
        return line.append(visible(turn.action.strip(), longest))
    line.append(gap_of(gaps), _colour(math.fsum(gaps)))
    line.append("  ")
    if longest is not None and len(turn.action) > longest:
        return line.append(visible(turn.action, longest))
    for place, (token, gap) in enumerate(zip(ids, gaps, strict=True)):
        text = group.token_texts.get(token, "")
        line.append(visible(text if place else text.lstrip()), _colour(gap))
    return line


def _drawn(picture: Mapping[str, Any] | None, observation: str, longest: int | None) -> Iterator[Text]:
    if picture is None:
        shown = Text(visible(observation, longest))
    elif picture["kind"] == "grid":
        legend = picture.get("legend") or {}
        shown = Text("\n").join(_row(row, legend) for row in picture["rows"])
    elif picture["kind"] == "code":
        error = picture.get("error")
        shown = Text(visible(picture["output"], longest), "red" if error else "")
    else:
        shown = Text(visible(picture["text"], longest))
    if picture and picture.get("caption"):
        shown.append(f"\n{visible(picture['caption'])}", "italic")
    if shown.plain:
        yield _indented(shown)


def _row(row: str, legend: Mapping[str, str]) -> Text:
    return Text.assemble(*((visible(cell), _cell(legend.get(cell, ""))) for cell in row))


def _cell(name: str) -> str:
    return PLAYER if name.startswith("player") else CELLS.get(name, "")


def _block(title: str, text: str, longest: int | None) -> Iterator[Text]:
    yield Text(f"{title}:", "bold")
    yield _indented(Text(visible(text.strip(), longest)))


def _indented(text: Text) -> Text:
    return Text("\n").join(Text.assemble("     ", line) for line in text.split("\n", allow_blank=True))


def _colour(gap: float) -> str:
    """From grey to blue, or to orange for negative gaps; a gap of 1 nat is three quarters of the way."""
    if math.isnan(gap):
        return "red"
    end = TEACHER_HIGHER if gap > 0 else TEACHER_LOWER
    part = math.tanh(abs(gap))
    red, green, blue = (round(grey + part * (full - grey)) for grey, full in zip(NEUTRAL, end, strict=True))
    return f"rgb({red},{green},{blue})"
