"""The rule-based summariser: turns a finished episode into a short skill, without a language model or a solver.

It replays the episode's moves on the task's level and never searches for a better solution: a skill contains only what
the student found itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skillsd.envs.sokoban import language
from skillsd.envs.sokoban.board import MOVES, Level, State, count_pushes
from skillsd.envs.sokoban.presets import Style
from skillsd.types import Skill, Trajectory

MAX_MISTAKES = 2
"""Maximum number of pushes a skill warns about. The first one made the level unsolvable; later ones matter little."""

MIN_LOOP_VISITS = 3
"""A loop is reported once a state was visited this often."""

MAX_LOOP_CELLS = 4
"""Maximum number of a loop's cells that a skill names."""

_MOVE = {word: move for move, word in enumerate(MOVES)}


@dataclass(frozen=True)
class Mistake:
    """An irreversible push: the player's cell, the move, and the box's cells before and after."""

    player: int
    move: int
    box: int
    beyond: int


def summariser(style: Style) -> Callable[[Trajectory], Skill | None]:
    """The summariser for a prompt style."""

    def summarise(trajectory: Trajectory) -> Skill | None:
        level = Level.from_rows(str(trajectory.task.payload["level"]).split("\n"))
        moves = [_MOVE[word] for turn in trajectory.turns for word in turn.info.get("moves", ())]
        misread = sum(bool(turn.info.get("invalid")) for turn in trajectory.turns)
        return summarise_moves(level, moves, style, misread=misread)

    return summarise


def summarise_moves(level: Level, moves: Sequence[int], style: Style, *, misread: int = 0) -> Skill | None:
    """The skill for an episode with these moves (including blocked ones); None if there is nothing to report.

    Args:
        misread: number of turns that could not be parsed. Only the prose styles mention them.
    """
    states = _played(level, moves)
    end = len(moves) if level.is_solved(states[-1]) else _best_unsolved(level, states)
    path = without_loops(states, moves[:end])
    skill = _skill(level, path, find_mistakes(level, states, moves), _find_loop(level, states), style, misread)
    return None if skill.is_empty else skill


def in_prose(level: Level, skill: Skill) -> Skill:
    """A skill of the terse style for this level, in the words of the prose styles.

    Returned as it is if it is not in the terse style; a language model may have written it.
    """
    path = [_MOVE[word] for word in skill.golden_workflow.split() if word in _MOVE]
    warned, _, looped = skill.mistake_analysis.partition("loop ")
    cells = {f"@{name}": cell for cell, name in enumerate(level.names)}
    words = [word for word in warned.split() if word != "never"]
    loop = [cells[word] for word in looped.split() if word in cells]
    mistakes = []
    for cell, move in zip(words[::2], words[1::2], strict=False):
        if cell in cells and move in _MOVE:
            box = level.neighbours[cells[cell]][_MOVE[move]]
            mistakes.append(Mistake(cells[cell], _MOVE[move], box, level.neighbours[box][_MOVE[move]]))
    if _skill(level, path, mistakes, loop, "terse") != skill:
        return skill
    return _skill(level, path, mistakes, loop, "objects")


def _skill(
    level: Level, path: Sequence[int], mistakes: Sequence[Mistake], loop: Sequence[int], style: Style, misread: int = 0
) -> Skill:
    """The skill in the words of a style.

    Args:
        path: moves without detours, to the solution or to the best state reached.
    """
    end = _played(level, path)[-1]
    workflow = language.plan(level, level.start, path, style)
    if style == "terse":
        pushes = count_pushes(level, level.start, path)
        warnings = [f"never @{level.names[m.player]} {MOVES[m.move]}" for m in mistakes]
        if loop:
            warnings.append("loop " + " ".join(f"@{level.names[cell]}" for cell in loop))
        return Skill(
            f"solved {len(path)} moves {pushes} pushes" if level.is_solved(end) else "", " ".join(warnings), workflow
        )
    return Skill(
        _success_in_prose(level, path, end, level.is_solved(end)),
        _mistakes_in_prose(level, mistakes, loop, misread),
        f"{workflow[0].upper()}{workflow[1:]}." if workflow else "",
    )


def _played(level: Level, moves: Sequence[int]) -> list[State]:
    """The state before each move, and the last one. Blocked moves change nothing."""
    states = [level.start]
    for move in moves:
        after = level.play(states[-1], move)
        states.append(states[-1] if after is None else after)
    return states


def without_loops(states: Sequence[State], moves: Sequence[int]) -> list[int]:
    """The moves without detours: when a state recurs, everything since its first visit is removed.

    Args:
        states: ``states[i]`` is the state before ``moves[i]``; needs at least one state more than moves.
    """
    path: list[int] = []
    depth = {states[0]: 0}  # state -> number of moves on the path to it
    visited = [states[0]]
    for move, state in zip(moves, states[1:], strict=False):
        if state in depth:
            for removed in visited[depth[state] + 1 :]:
                del depth[removed]
            del visited[depth[state] + 1 :]
            del path[depth[state] :]
        else:
            path.append(move)
            visited.append(state)
            depth[state] = len(path)
    return path


def _best_unsolved(level: Level, states: Sequence[State]) -> int:
    """Index of the first state, deadlocks excluded, with the most boxes on targets; 0 if none beats the start."""
    best, most = 0, level.on_target(states[0])
    for index, state in enumerate(states):
        if level.on_target(state) > most and not level.is_dead(state):
            best, most = index, level.on_target(state)
    return best


def find_mistakes(level: Level, states: Sequence[State], moves: Sequence[int]) -> list[Mistake]:
    """The pushes that made the level unsolvable, the decisive one first; at most `MAX_MISTAKES`.

    A later push counts only if it moved another box onto a dead square.
    """
    mistakes: list[Mistake] = []
    for before, move, after in zip(states, moves, states[1:], strict=False):
        if after[1] == before[1] or not level.is_dead(after):
            continue
        if not level.is_dead(before) or _boxes_lost(level, after) > _boxes_lost(level, before):
            mistakes.append(Mistake(before[0], move, after[0], level.neighbours[after[0]][move]))
            if len(mistakes) == MAX_MISTAKES:
                break
    return mistakes


def _boxes_lost(level: Level, state: State) -> int:
    return sum(box not in level.push_distance for box in state[1])


def _find_loop(level: Level, states: Sequence[State]) -> list[int]:
    """The player's cells along the most repeated loop; empty if no state occurs `MIN_LOOP_VISITS` times.

    Only states before the first deadlock count: after it, loops do no further harm.
    """
    alive = []
    for state in states:
        if level.is_dead(state):
            break
        alive.append(state)
    if not alive:
        return []
    counts = Counter(alive)
    most = max(counts.values())
    if most < MIN_LOOP_VISITS:
        return []
    state = next(state for state in alive if counts[state] == most)
    first = alive.index(state)
    again = alive.index(state, first + 1)
    cells = dict.fromkeys(visited[0] for visited in alive[first:again])  # in order, without duplicates
    return list(cells)[:MAX_LOOP_CELLS]


def _success_in_prose(level: Level, path: Sequence[int], reached: State, solved: bool) -> str:
    if not path:
        return ""
    pushes = count_pushes(level, level.start, path)
    what = f"{len(path)} moves with {pushes} {'push' if pushes == 1 else 'pushes'}"
    if solved:
        return f"Solved in {what}."
    return f"{level.on_target(reached)} of {len(level.boxes)} boxes reached a target in {what}; not solved."


def _mistakes_in_prose(level: Level, mistakes: Sequence[Mistake], loop: Sequence[int], misread: int) -> str:
    names = level.names
    sentences = [
        f"Never push the box at {names[m.box]} {MOVES[m.move]} (standing at {names[m.player]}): "
        f"at {names[m.beyond]} it is stuck for good."
        for m in mistakes
    ]
    if loop:
        sentences.append(f"Do not go round in circles: {', '.join(names[cell] for cell in loop)}.")
    if misread:
        sentences.append("Answer with legal moves only: an answer that can't be read costs a move.")
    return " ".join(sentences)
