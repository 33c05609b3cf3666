"""Prompts and observations as text, and parsing of the agent's text.

Three styles. ``terse`` is for tiny models: a turn is a few tokens, and walls and targets appear in the prompt only.
``objects`` and ``grid`` are for language models: English prose, with the state as a list or as an ASCII grid.

Results depend on the exact wording: changing a text invalidates comparisons with earlier results.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from skillsd.envs.sokoban.board import MOVES, Level, State
from skillsd.envs.sokoban.presets import Style

_BY_WORD = {word.lower(): move for move, word in enumerate(MOVES)}
_SEPARATORS = re.compile(r"(?:\|\||[,\s])+")
_OPENING = ("<action>", "<answer>")
_CLOSING = re.compile("</action>|</answer>")


def parse(text: str) -> list[int] | None:
    """Parse the agent's text into moves (indices into `MOVES`); None if it is invalid.

    Reads the last ``<action>`` or ``<answer>`` tag, or the whole text if there is none. The closing tag is optional
    (generation often stops at it). Case-insensitive; moves are separated by commas, ``||`` or white space. One unknown
    word makes the whole text invalid: a lenient parser would reward sloppy output.
    """
    lowered = text.lower()
    start = max(lowered.rfind(tag) for tag in _OPENING)
    if start >= 0:
        lowered = _CLOSING.split(lowered[start + len(_OPENING[0]) :], maxsplit=1)[0]
    words = [word for word in _SEPARATORS.split(lowered) if word]
    moves = [_BY_WORD.get(word, -1) for word in words]
    return None if not moves or -1 in moves else moves


@dataclass(frozen=True)
class Answer:
    """The facts of a turn that its observation reports.

    Attributes:
        moves: the moves made, including blocked ones.
        blocked: the moves blocked by a wall or a box.
        invalid: whether parsing failed.
        dropped: number of moves ignored because they exceed the limit per turn.
        steps_left: moves left in the episode.
    """

    moves: Sequence[int]
    blocked: Sequence[int]
    invalid: bool
    dropped: int
    steps_left: int


def standing(level: Level, state: State) -> str:
    """The boxes, then the player: ``$r2c3 @r3c1``; ``*`` is a box on a target, ``+`` the player on one."""
    player, boxes = state
    names, targets = level.names, level.targets
    parts = [("*" if box in targets else "$") + names[box] for box in boxes]
    parts.append(("+" if player in targets else "@") + names[player])
    return " ".join(parts)


def inner_walls(level: Level) -> list[int]:
    """The walls that are not part of the border."""
    return [
        cell
        for cell in level.walls
        if 0 < cell // level.width < level.height - 1 and 0 < cell % level.width < level.width - 1
    ]


def picture(level: Level, state: State) -> str:
    """The room as rows of symbols, with floor as ``_`` (blanks are easily lost on the way to the model)."""
    return level.ascii(state).replace(" ", "_")


def prompt(level: Level, style: Style, max_steps: int, max_actions: int) -> str:
    """The episode's first prompt, a single message."""
    if style == "terse":
        walls = [f"#{level.names[cell]}" for cell in inner_walls(level)]
        targets = [f".{level.names[cell]}" for cell in level.targets]
        return " ".join(["Sokoban:", *walls, *targets, standing(level, level.start)])
    if max_actions == 1:
        how = "Answer with one move, Up, Down, Left or Right, like this: <action>Up</action>."
    else:
        how = (
            f"Answer with 1 to {max_actions} moves (Up, Down, Left, Right), separated by commas, like this: "
            "<action>Up, Right</action>."
        )
    boxes = "the box onto the target" if len(level.boxes) == 1 else "every box onto a target"
    rules = (
        f"You are solving a Sokoban puzzle: push {boxes} within {max_steps} moves.\n"
        "Each move takes you one cell Up, Down, Left or Right. Walking into a box pushes it one cell further "
        "if the cell behind it is free; a box can't be pushed into a wall or another box, and never pulled. "
        "So a box in a corner is stuck for good. A blocked move changes nothing, but it counts.\n"
        f"{how} Everything outside the tag is ignored."
    )
    if style == "grid":
        legend = "# wall, _ floor, . target, $ box, * box on a target, @ you, + you on a target"
        return f"{rules}\n\nThe room ({legend})\n{picture(level, level.start)}"
    walls_list = ", ".join(level.names[cell] for cell in inner_walls(level)) or "none"
    return (
        f"{rules}\n\nCells are named by row and column: r1c2 is row 1, column 2. Up leads to a smaller row, "
        f"Left to a smaller column. The room has {level.height - 2} rows and {level.width - 2} columns "
        f"inside its outer walls: r1c1 to r{level.height - 2}c{level.width - 2}.\n"
        f"Inner walls: {walls_list}\n"
        f"Targets: {', '.join(level.names[cell] for cell in level.targets)}\n"
        f"{_objects(level, level.start)}"
    )


def observe(level: Level, state: State, answer: Answer, style: Style, max_actions: int) -> str:
    """The observation after a turn."""
    solved = level.is_solved(state)
    if style == "terse":
        if solved:
            return "Solved"
        if answer.steps_left <= 0:
            return "Over"
        return ("Invalid " if answer.invalid else "") + standing(level, state)
    lines = []
    if answer.invalid:
        lines.append(
            "That was not understood, so nothing moved; it still cost a move. "
            "Answer with Up, Down, Left or Right, like this: <action>Up</action>."
        )
    if answer.dropped:
        lines.append(f"Only the first {max_actions} of your {max_actions + answer.dropped} moves were considered.")
    if answer.blocked:
        lines.append(f"Blocked, nothing moved: {', '.join(MOVES[move] for move in answer.blocked)}.")
    lines.append(picture(level, state) if style == "grid" else _objects(level, state))
    lines.append(f"Boxes on targets: {level.on_target(state)}/{len(level.boxes)}. Moves left: {answer.steps_left}.")
    if solved:
        lines.append("Solved!")
    elif answer.steps_left <= 0:
        lines.append("The episode is over: no moves are left.")
    return "\n".join(lines)


def _objects(level: Level, state: State) -> str:
    player, boxes = state
    listed = ", ".join(level.names[box] + (" (on a target)" if box in level.targets else "") for box in boxes)
    here = " (on a target)" if player in level.targets else ""
    return f"Boxes: {listed}\nYou: {level.names[player]}{here}"


def action_text(move: int, style: Style) -> str:
    """The agent's text for one move."""
    return MOVES[move] if style == "terse" else f"<action>{MOVES[move]}</action>"


def plan(level: Level, state: State, moves: Sequence[int], style: Style) -> str:
    """A sequence of moves from `state` as text, for skills and oracles.

    Terse style: ``@r2c2 Right @r2c3 Up``. Prose styles: each walk between pushes with its destination, each push with
    the box, the direction and the number of cells.
    """
    if style == "terse":
        words = []
        for move in moves:
            words.append(f"@{level.names[state[0]]} {MOVES[move]}")
            after = level.play(state, move)
            state = state if after is None else after
        return " ".join(words)
    sentences: list[str] = []
    walk: list[str] = []
    last: tuple[int, int, int] | None = None  # the box's current cell, direction, cells pushed so far
    for move in moves:
        after = level.play(state, move)
        if after is None:
            continue
        if after[1] == state[1]:
            walk.append(MOVES[move])
        else:
            box = level.neighbours[state[0]][move]
            beyond = level.neighbours[box][move]
            cells = last[2] + 1 if last is not None and not walk and last[:2] == (box, move) else 1
            if cells > 1:
                sentences.pop()
            if walk:
                sentences.append(f"walk {', '.join(walk)} to {level.names[state[0]]}")
                walk = []
            origin = box
            for _ in range(cells - 1):
                origin = level.neighbours[origin][move ^ 1]  # Up/Down and Left/Right are neighbours in MOVES
            times = "" if cells == 1 else f" {cells} times"
            sentences.append(f"push the box at {level.names[origin]} {MOVES[move]}{times} (to {level.names[beyond]})")
            last = (beyond, move, cells)
        state = after
    if walk:
        sentences.append(f"walk {', '.join(walk)} to {level.names[state[0]]}")
    return "; ".join(sentences)
