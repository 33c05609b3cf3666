"""A run's folder with recorded Sokoban episodes, made by hand: nothing is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from skillsd.config import RunConfig, dump, load
from skillsd.envs.sokoban import Sokoban
from skillsd.envs.sokoban.board import MOVES, Level
from skillsd.envs.sokoban.game import Game, task_of
from skillsd.rollouts.groups import RecordedEpisode, RecordedGroup, write_groups
from skillsd.types import Message, Outcome, Trajectory, Turn

LEVEL = Level.from_rows(["######", "#@$ .#", "#    #", "######"])
TASK = task_of(LEVEL, "train", 2)
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \u202eback\u2066 <script>alert(1)</script> [bold]markup[/bold]"


def episode(*moves: str, gaps: tuple[float, ...] | None = None, advantage: float = 0.0) -> RecordedEpisode:
    """An episode of these moves, a token each, sampled with probability 1/2."""
    game = Game(LEVEL, Sokoban().rules)
    tokens, mask, turns = [100, 101], [False, False], []
    for move in moves:
        step = game.step(move)
        turns.append(Turn(move, step.observation, len(tokens), len(tokens) + 1, step.info))
        tokens += [MOVES.index(move) if move in MOVES else 9, 50]
        mask += [True, False]
    reward, success = (step.reward, step.success) if moves else (0.0, False)
    trajectory = Trajectory(
        task=TASK,
        prompt=game.prompt() if not moves else Game(LEVEL, Sokoban().rules).prompt(),
        tokens=tuple(tokens),
        action_mask=tuple(mask),
        logprobs=tuple(-0.6931 if marked else 0.0 for marked in mask),
        prompt_length=2,
        turns=tuple(turns),
        outcome=Outcome.SOLVED if success else Outcome.TRUNCATED_TURNS,
        reward=reward,
        success=success,
        seed=1,
        versions=(0, 0),
    )
    student = (-0.6931,) * len(moves)
    teacher = None if gaps is None else tuple(p + gap for p, gap in zip(student, gaps, strict=True))
    return RecordedEpisode(trajectory, advantage, teacher, student)


def group(iteration: int, *episodes: RecordedEpisode, **changes: Any) -> RecordedGroup:
    taught = any(member.teacher_logprobs is not None for member in episodes)
    made = RecordedGroup(
        iteration=iteration,
        task=TASK,
        context="skill" if taught else None,
        skill_id=7 if taught else None,
        context_text="Workflow: Right Right" if taught else None,
        teacher_prompt="<s>Workflow: Right Right Sokoban: ..." if taught else None,
        teacher_prompt_length=5 if taught else None,
        student_prompt="<s>Sokoban: ...",
        student_prompt_length=2,
        taught=taught,
        untaught=None if taught else "there is no skill for this task yet",
        minibatch=0,
        applied=True,
        episodes=episodes,
        token_texts={9: "?", **{place: f" {move}" for place, move in enumerate(MOVES)}},
    )
    return replace(made, **changes)


SOLVED = episode("Right", "Right", gaps=(0.5, -1.25), advantage=1.0)
FAILED = episode("Down", "Up", "Left", gaps=(-2.0, 0.0, 0.01), advantage=-1.0)


def hostile() -> RecordedGroup:
    """A group whose texts would harm a terminal or a page that trusts them."""
    plain = episode("Left")
    [turn] = plain.trajectory.turns
    bad = replace(turn, action=HOSTILE, observation="long " * 2000 + HOSTILE, info={})
    trajectory = replace(plain.trajectory, turns=(bad,), prompt=(Message("user", HOSTILE),))
    return group(3, replace(plain, trajectory=trajectory), context_text=HOSTILE)


def recorded_run(folder: Path, **sections: Any) -> Path:
    """A run with the iterations 1 (no teacher) and 3 (a taught group and a hostile one)."""
    folder.mkdir()
    config = load(RunConfig, "sokoban-nano").model_copy(update=sections)
    (folder / "config.yaml").write_text(dump(config))
    write_groups(folder / "trajectories", 1, [group(1, episode("Right", "Right"), episode("Left"))])
    write_groups(folder / "trajectories", 3, [group(3, SOLVED, FAILED), hostile()])
    return folder
