"""Playing in the terminal, with scripted input."""

from __future__ import annotations

import pytest

from skillsd.envs.play import Played, play
from skillsd.envs.sokoban import Sokoban
from skillsd.errors import UserError


def session(lines: list[str], which: int | str = 0) -> tuple[Played, str]:
    """Play with these input lines, then end of input. Returns the result and the output."""
    shown: list[str] = []
    typed = iter(lines)

    def read(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    result = play(Sokoban(), "train", which, input=read, print=shown.append)
    return result, "\n".join(shown)


def test_keys_actions_restart_and_help() -> None:
    task = Sokoban().tasks("train")[0]
    plan = Sokoban().oracle(task)
    assert plan is not None
    keys = {action: key for key, action in Sokoban.shortcuts.items()}
    moves = plan.split()[1::2]
    result, shown = session(["?", "s", "nonsense", "r", keys[moves[0]].upper(), *moves[1:]], task.id)
    assert result == Played(len(moves), 1.0, True)
    assert "w Up" in shown
    assert "Invalid" in shown
    assert "######" in shown
    assert f"Solved in {len(moves)} turns, reward 1.00." in shown


def test_q_and_end_of_input_quit() -> None:
    assert session(["q"])[0] == Played(0, 0.0, False)
    result, shown = session(["w"])
    assert result.turns == 1
    assert shown.endswith("Bye.")


@pytest.mark.parametrize("which", [96, -97, "no-such-id"])
def test_a_missing_task_is_an_error(which: int | str) -> None:
    with pytest.raises(UserError):
        session([], which)
