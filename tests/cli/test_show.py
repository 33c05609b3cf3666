"""`skillsd show`: recorded episodes in the terminal."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import Command, assert_one_line
from recorded_run import HOSTILE, SOLVED, TASK, group, recorded_run
from rich.console import Console

from skillsd.config import EnvironmentSection
from skillsd.report.episode import episode_text, visible
from skillsd.rollouts.groups import write_groups


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return recorded_run(tmp_path / "run")


def test_the_episodes_of_the_last_iteration_are_listed(skillsd: Command, run: Path) -> None:
    out = skillsd("show", run).out
    assert "iteration 3: 3 episodes in 2 groups, 1 of them with a teacher" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["3.0.0", TASK.id, "solved", "1.00", "+1.00", "2", "-0.375", "7"],
        ["3.0.1", TASK.id, "truncated_turns", "0.00", "-1.00", "3", "-0.663", "7"],
        ["3.1.0", TASK.id, "truncated_turns", "0.00", "+0.00", "1", "-", "-"],
    ]
    assert "other iterations (--iteration): 1" in out
    first = skillsd("show", run, "--iteration", 1, "--limit", 1).out
    assert "1.0.0" in first
    assert "1.0.1" not in first
    assert "1 more: --limit" in first


@pytest.mark.parametrize("name", ["3.0.0", f"3/{TASK.id}/0", f"iteration-3/{TASK.id}/0"])
def test_an_episode_turn_by_turn(name: str, skillsd: Command, run: Path) -> None:
    out = skillsd("show", run, name).out
    assert f"task {TASK.id} (difficulty 2): solved, reward 1.00, advantage +1.00, 2 turns, 2 sampled tokens" in out
    assert "teacher: with skill 7 in its prompt\ncontext:\n     Workflow: Right Right\n" in out
    boards = re.findall(r"     #.*", out)
    assert boards[1::4] == ["     #@$ .#", "     # @$.#", "     #  @*#"]
    assert "  1  +0.50  Right\n" in out
    assert "  2  -1.25  Right\n" in out
    assert "1 of 1 boxes on targets" in out
    assert "\x1b" not in out  # not a terminal


def test_an_episode_without_a_teacher(skillsd: Command, run: Path) -> None:
    out = skillsd("show", run, "1.0.1").out
    assert "no teacher: there is no skill for this task yet" in out
    assert "  1  Left\n" in out
    assert "gap" not in out


def colours(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console = Console(force_terminal=True, color_system="truecolor", markup=False, highlight=False, width=200)
    with console.capture() as captured:
        for line in episode_text(group(1, SOLVED), 0, lambda turn: None):
            console.print(line)
    return captured.get()


def test_the_gap_is_coloured_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = colours(monkeypatch)
    found = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+)m([+-]\d\.\d\d)", coloured)
    [(red, _, blue, likelier), (more_red, _, less_blue, less_likely)] = found
    assert (likelier, less_likely) == ("+0.50", "-1.25")
    assert int(blue) > int(red)
    assert int(more_red) > int(less_blue)
    plain = colours(monkeypatch, NO_COLOR="1")
    assert "38;2" not in plain
    assert "+0.50" in plain


def test_hostile_texts_are_shown_as_escapes_and_cut(skillsd: Command, tmp_path: Path) -> None:
    run = recorded_run(tmp_path / "run", environment=EnvironmentSection(name="gone:Gone"))  # texts, no boards
    for arguments in (("show", run), ("show", run, "3.1.0"), ("show", run, "3.1.0", "--full")):
        out = skillsd(*arguments).out
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out)
    shown = visible(HOSTILE)
    assert shown.startswith(r"\x1b[31mred\x1b]0;title\x07 \u202eback\u2066 <script>")
    assert shown.endswith("[bold]markup[/bold]")
    full, cut = skillsd("show", run, "3.1.0", "--full").out, skillsd("show", run, "3.1.0").out
    assert full.count(shown) == 4  # context, prompt, action, observation
    assert "more characters: --full)" in cut
    assert len(cut) < 7000 < len(full)


def test_an_action_of_several_tokens_has_one_number(skillsd: Command, run: Path) -> None:
    base = SOLVED.trajectory
    turn = replace(base.turns[0], end=4)
    trajectory = replace(
        base, tokens=(100, 0, 3, 9), action_mask=(False, True, True, True), logprobs=(0.0, -1.0, -1.0, -1.0),
        prompt_length=1, turns=(replace(turn, start=1, action="Up Right?"),),
    )  # fmt: skip
    given = replace(SOLVED, trajectory=trajectory, teacher_logprobs=(-1.0, -2.0, -0.5), student_logprobs=(-1.0,) * 3)
    write_groups(run / "trajectories", 5, [group(5, given)])
    assert "  1  -0.50  Up Right?\n" in skillsd("show", run, "5.0.0").out


def test_code_and_other_texts_are_drawn_too() -> None:
    pictures: dict[int | None, Any] = {
        None: {"kind": "text", "text": "the start\nof it", "caption": "before"},
        0: {"kind": "code", "input": "print(1)", "output": "1\x1b", "error": None},
        1: {"kind": "code", "input": "x", "output": "Failed", "error": "NameError"},
    }
    lines = list(episode_text(group(1, SOLVED), 0, pictures.get))
    assert [line.plain for line in lines[-5:]] == [
        "     the start\n     of it\n     before",
        "\n  1  +0.50  Right",
        "     1\\x1b",
        "\n  2  -1.25  Right",
        "     Failed",
    ]
    assert [any(str(span.style) == "red" for span in line.spans) for line in lines[-3::2]] == [False, True]


def test_without_its_environment_turns_are_texts(skillsd: Command, tmp_path: Path) -> None:
    run = recorded_run(tmp_path / "other", environment=EnvironmentSection(name="gone:Gone"))
    out = skillsd("show", run, "3.0.0").out
    assert out.startswith("note: turns are shown as text: ")
    assert "gone" in out
    assert "  1  +0.50  Right\n     $r1c3 @r1c2\n" in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["3.9.0"], ["iteration 3 has no group 9: its groups go from 0 to 1"]),
        (["3/other/0"], ["no group of the task 'other'", "--iteration 3"]),
        (["3.0.2"], ["no episode 2 in this group: its episodes go from 0 to 1"]),
        (["2.0.0"], ["no trajectories of iteration 2; it has: 1, 3"]),
        (["best"], ["'best': expected ITERATION.GROUP.EPISODE"]),
        (["--iteration", 2], ["no trajectories of iteration 2; it has: 1, 3"]),
    ],
)
def test_mistakes_are_one_line(words: list[Any], parts: list[str], skillsd: Command, run: Path) -> None:
    assert_one_line(skillsd("show", run, *words), *parts)


def test_folders_that_have_nothing_to_show(skillsd: Command, run: Path, tmp_path: Path) -> None:
    assert_one_line(skillsd("show", tmp_path), "is not a run's folder")
    file = run / "trajectories" / "iteration-00003.jsonl.gz"
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    assert_one_line(skillsd("show", run), "iteration-00003.jsonl.gz' is damaged", "restore the file from a copy")
    file.rename(file.with_suffix(""))
    assert_one_line(skillsd("show", run), "has an earlier version's format")
    for path in (run / "trajectories").iterdir():
        path.unlink()
    assert_one_line(skillsd("show", run), "has no trajectories: it has not finished an iteration yet")
