"""The rule-based summariser: what a finished episode teaches, in a few words, without a language model or a
solver.

It replays the episode's moves from the task's level. It never looks for a better way than the one that was
played:
what the skill knows, the student has found itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skillsd.envs.sokoban import language
from skillsd.envs.sokoban.board import MOVES, Level, State, count_pushes
from skillsd.envs.sokoban.presets import Style
from skillsd.types import Skill, Trajectory

MOST_MISTAKES = 2
"""Pushes that a skill warns of. The first lost the level; what came after it matters little."""

CLEAR_LOOP = 3
"""A loop is worth a word when a state was stood in this often."""

LONGEST_LOOP = 4
"""Cells of a loop that are named."""

_MOVE = {word: move for move, word in enumerate(MOVES)}


@dataclass(frozen=True)
class Mistake:
    """A push that can't be made good: where the player stood, the move, and the box's cells before and
    after.
    """

    player: int
    move: int
    box: int
    beyond: int


def summariser(style: Style) -> Callable[[Trajectory], Skill | None]:
    """The summariser that words its skills in the given style."""

    def summarise(trajectory: Trajectory) -> Skill | None:
        if not trajectory.outcome.has_reward:
            return None  # cut off by the infrastructure: what was left undone is not the student's mistake
        level = Level.from_rows(str(trajectory.task.payload["level"]).split("\n"))
        moves = [_MOVE[word] for turn in trajectory.turns for word in turn.info.get("moves", ())]
        misread = sum(bool(turn.info.get("invalid")) for turn in trajectory.turns)
        return summarise_moves(level, moves, style, misread=misread)

    return summarise


def summarise_moves(level: Level, moves: Sequence[int], style: Style, *, misread: int = 0) -> Skill | None:
    """The skill of an episode in which `moves` were made, blocked ones included; None if it teaches nothing.

    Args:
        misread: number of answers that could not be read. Only the prose styles mention them.
    """
    states = [level.start]
    for move in moves:
        after = level.play(states[-1], move)
        states.append(states[-1] if after is None else after)
    solved = level.is_solved(states[-1])
    end = len(moves) if solved else _best_unsolved(level, states)
    path = without_loops(states, moves[:end])
    mistakes = find_mistakes(level, states, moves)
    loop = _find_loop(level, states)
    workflow = language.plan(level, level.start, path, style)
    if style == "terse":
        said = f"solved {len(path)} moves {count_pushes(level, level.start, path)} pushes" if solved else ""
        warnings = [f"never @{level.names[m.player]} {MOVES[m.move]}" for m in mistakes]
        if loop:
            warnings.append("loop " + " ".join(f"@{level.names[cell]}" for cell in loop))
        skill = Skill(said, " ".join(warnings), workflow)
    else:
        skill = Skill(
            _success_in_prose(level, path, states[end], solved),
            _mistakes_in_prose(level, mistakes, loop, misread),
            f"{workflow[0].upper()}{workflow[1:]}." if workflow else "",
        )
    return None if skill.is_empty else skill


def without_loops(states: Sequence[State], moves: Sequence[int]) -> list[int]:
    """The moves without detours: whenever a state is met again, what happened since the first time is cut
    out.

    Args:
        states: ``states[i]`` is the state before ``moves[i]``; one state more than moves (or more).
    """
    path: list[int] = []
    depth = {states[0]: 0}  # state -> number of moves on the path that leads to it
    visited = [states[0]]
    for move, state in zip(moves, states[1:], strict=False):
        if state in depth:
            for forgotten in visited[depth[state] + 1 :]:
                del depth[forgotten]
            del visited[depth[state] + 1 :]
            del path[depth[state] :]
        else:
            path.append(move)
            visited.append(state)
            depth[state] = len(path)
    return path


def _best_unsolved(level: Level, states: Sequence[State]) -> int:
    """Index of the first state with the most boxes on targets that is not lost; 0 if none is better than the
    start.
    """
    best, most = 0, level.on_target(states[0])
    for index, state in enumerate(states):
        if level.on_target(state) > most and not level.is_dead(state):
            best, most = index, level.on_target(state)
    return best


def find_mistakes(level: Level, states: Sequence[State], moves: Sequence[int]) -> list[Mistake]:
    """The pushes that lost the level, the decisive one first; at most `MOST_MISTAKES`.

    After the first, another one counts if it brought one more box onto a dead square.
    """
    mistakes: list[Mistake] = []
    for before, move, after in zip(states, moves, states[1:], strict=False):
        if after[1] == before[1] or not level.is_dead(after):
            continue
        if not level.is_dead(before) or _boxes_lost(level, after) > _boxes_lost(level, before):
            mistakes.append(Mistake(before[0], move, after[0], level.neighbours[after[0]][move]))
            if len(mistakes) == MOST_MISTAKES:
                break
    return mistakes


def _boxes_lost(level: Level, state: State) -> int:
    return sum(box not in level.push_distance for box in state[1])


def _find_loop(level: Level, states: Sequence[State]) -> list[int]:
    """Where the player stood in the loop that was walked most often; empty if no state came up `CLEAR_LOOP`
    times.

    Once the level is lost, walking about is no mistake any more and is not looked at.
    """
    alive = []
    for state in states:
        if level.is_dead(state):
            break
        alive.append(state)
    if not alive:
        return []
    counts = Counter(alive)
    often = max(counts.values())
    if often < CLEAR_LOOP:
        return []
    state = next(state for state in alive if counts[state] == often)
    first = alive.index(state)
    again = alive.index(state, first + 1)
    cells = dict.fromkeys(visited[0] for visited in alive[first:again])  # in order, each once
    return list(cells)[:LONGEST_LOOP]


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
    said = [
        f"Never push the box at {names[m.box]} {MOVES[m.move]} (standing at {names[m.player]}): "
        f"at {names[m.beyond]} it is stuck for good."
        for m in mistakes
    ]
    if loop:
        said.append(f"Do not go round in circles: {', '.join(names[cell] for cell in loop)}.")
    if misread:
        said.append("Answer with legal moves only: an answer that can't be read costs a move.")
    return " ".join(said)
