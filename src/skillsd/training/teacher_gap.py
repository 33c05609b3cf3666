"""Where the teacher, told a skill, differs from the student: turn by turn, on the student's own training episodes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from skillsd.engines.base import Engine, TokenSequence, Weights
from skillsd.objective import ESTIMATORS, TokenLogprobs
from skillsd.rollouts.collect import collect
from skillsd.seeds import derive_seed
from skillsd.training import lessons
from skillsd.training.batches import view
from skillsd.training.run import Run
from skillsd.types import TRAIN_SPLIT, Outcome, Trajectory

BUCKETS = ((1, 2), (3, 5), (6, 10), (11, 20), (21, 10**9))
"""First and last turn of each row of the table."""


@dataclass(frozen=True)
class TurnGap:
    """One turn of one episode; sums over its tokens.

    Attributes:
        number: which turn, from 1.
        solved: the episode was.
        from_success: the teacher's skill was written from a solved trajectory.
        log_ratio: of l_t, student minus teacher log-prob of the sampled token.
        kl: of KL(student || teacher) over the vocabulary.
        moved: tokens where the teacher's most likely one is not the student's.
    """

    number: int
    solved: bool
    from_success: bool
    tokens: int
    log_ratio: float
    abs_log_ratio: float
    kl: float
    moved: int


@dataclass
class Gap:
    """What was compared.

    Attributes:
        untold: tasks without a skill, or whose skill is too long for the teacher.
        dropped: tasks whose episodes the infrastructure broke.
    """

    turns: list[TurnGap] = field(default_factory=list)
    tasks: int = 0
    episodes: int = 0
    untold: int = 0
    dropped: int = 0


async def measure_gap(
    run: Run,
    *,
    episodes: int,
    seed: int,
    tasks: int | None = None,
    teacher: tuple[Engine, Weights] | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> Gap:
    """Play training tasks as training does, and have the teacher re-score them, told what it would be told now.

    Args:
        tasks: only so many, drawn by the seed; None takes all.
        teacher: another engine or weights than the run's teacher.
    """
    chosen = list(run.task_set.tasks(TRAIN_SPLIT))
    if tasks is not None and tasks < len(chosen):
        chosen = random.Random(derive_seed(seed, "gap tasks")).sample(chosen, tasks)
    found = lessons.choose(run, chosen)
    told = [task for task in chosen if found[task.id].skill and found[task.id].text is not None]
    options = run.config.rollout
    played = await collect(
        run.student,
        run.task_set,
        told,
        run.budget,
        group_size=episodes,
        seed=derive_seed(seed, "gap"),
        retries=options.retries,
        concurrency=options.concurrency,
        on_episode=on_episode,
    )
    gap = Gap(untold=len(chosen) - len(told), dropped=len(played.dropped))
    for group in played.groups:
        skill, text = found[group.task.id].skill, found[group.task.id].text
        assert skill is not None
        assert text is not None
        seen = [view(trajectory, text, run.renderer) for trajectory in group.trajectories]
        if max(len(sequence.tokens) for sequence in seen) > run.engine.max_length:
            gap.untold += 1
            continue
        gap.tasks, gap.episodes = gap.tasks + 1, gap.episodes + len(group.trajectories)
        for trajectory, sequence in zip(group.trajectories, seen, strict=True):
            from_success = skill.source_outcome is Outcome.SOLVED
            gap.turns += turn_gaps(
                trajectory, sequence, run.engine, teacher or (run.engine, "teacher"), options.temperature, from_success
            )
    return gap


def turn_gaps(
    trajectory: Trajectory,
    seen: TokenSequence,
    student: Engine,
    teacher: tuple[Engine, Weights],
    temperature: float,
    from_success: bool = True,
) -> list[TurnGap]:
    """The turns of one trajectory, which the teacher sees as `seen`. One trajectory at a time is scored, as
    ``[tokens, vocabulary]`` is much."""
    if not trajectory.turns:
        return []
    own_sequence = TokenSequence(trajectory.tokens, trajectory.action_mask)
    own = student.score([own_sequence], temperature=temperature, distribution=True)[0]
    told = teacher[0].score([seen], teacher[1], temperature=temperature, distribution=True)[0]
    sampled = [token for token, marked in zip(trajectory.tokens, trajectory.action_mask, strict=True) if marked]
    pi, q = (TokenLogprobs(x.gather(1, torch.tensor([sampled]).T).squeeze(1), x) for x in (own, told))
    terms = ESTIMATORS["reverse_kl"].terms(pi, q, pi.chosen)  # on-policy; pi_old plays no part in the exact one
    moved = own.argmax(1) != told.argmax(1)
    gaps: list[TurnGap] = []
    start = 0
    for number, turn in enumerate(trajectory.turns, 1):
        here = slice(start, start + turn.end - turn.start)
        start = here.stop
        gaps.append(
            TurnGap(
                number=number,
                solved=trajectory.success,
                from_success=from_success,
                tokens=turn.end - turn.start,
                log_ratio=float(terms.log_ratio[here].sum()),
                abs_log_ratio=float(terms.log_ratio[here].abs().sum()),
                kl=float(terms.value[here].sum()),
                moved=int(moved[here].sum()),
            )
        )
    return gaps


SPLITS: dict[str, Callable[[TurnGap], bool]] = {
    "all": lambda turn: True,
    "episode solved": lambda turn: turn.solved,
    "episode not solved": lambda turn: not turn.solved,
    "skill from a success": lambda turn: turn.from_success,
    "skill from a failure": lambda turn: not turn.from_success,
}


def gap_figures(turns: Sequence[TurnGap]) -> list[dict[str, str | int | float]]:
    """A row for each split and range of turns that has any: means per token, and the share of turns in which the
    teacher's most likely token differs at one place at least (``turns_moved``: it would have acted otherwise)."""
    rows: list[dict[str, str | int | float]] = []
    for split, belongs in SPLITS.items():
        mine = [turn for turn in turns if belongs(turn)]
        for first, last in ((1, BUCKETS[-1][1]), *BUCKETS):
            here = [turn for turn in mine if first <= turn.number <= last]
            if not here:
                continue
            tokens = sum(turn.tokens for turn in here)
            every = (first, last) == (1, BUCKETS[-1][1])
            rows.append(
                {
                    "split": split,
                    "turns": "all" if every else f"{first}-{last}" if last < BUCKETS[-1][1] else f"{first}-",
                    "count": len(here),
                    "tokens": tokens,
                    "log_ratio": sum(turn.log_ratio for turn in here) / tokens,
                    "abs_log_ratio": sum(turn.abs_log_ratio for turn in here) / tokens,
                    "kl": sum(turn.kl for turn in here) / tokens,
                    "tokens_moved": sum(turn.moved for turn in here) / tokens,
                    "turns_moved": sum(turn.moved > 0 for turn in here) / len(here),
                }
            )
    return rows
