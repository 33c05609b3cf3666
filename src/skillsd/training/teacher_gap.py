"""How far the teacher, with a skill in its prompt, differs from the student: by turn, on the student's own episodes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from skillsd.engines.base import Learner, TokenSequence, Weights
from skillsd.objective import ESTIMATORS, WHOLE
from skillsd.rollouts.collect import collect
from skillsd.seeds import derive_seed
from skillsd.training.batch import teacher_sequence
from skillsd.training.contexts import select_contexts
from skillsd.training.run import Run
from skillsd.types import TRAIN_SPLIT, Outcome, Trajectory

BUCKETS = ((1, 2), (3, 5), (6, 10), (11, 20), (21, 10**9))
"""First and last turn of each row of the table."""


@dataclass(frozen=True)
class TurnGap:
    """One turn of one episode; the values are sums over its tokens.

    Attributes:
        number: of the turn, from 1.
        solved: whether the episode was solved.
        from_success: whether the teacher's skill was written from a solved trajectory.
        tokens: number of sampled tokens.
        log_ratio: sum of l_t, the student's minus the teacher's log-prob of the sampled token.
        abs_log_ratio: sum of abs(l_t).
        kl: sum of KL(student || teacher) over the vocabulary.
        moved: number of tokens at which the teacher's most likely token differs from the student's.
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
    """The compared turns.

    Attributes:
        tasks, episodes: number of those that were compared.
        without_teacher: number of tasks without a skill, or with a skill that is too long for the teacher's prompt.
        dropped: number of tasks lost to infrastructure failures.
    """

    turns: list[TurnGap] = field(default_factory=list)
    tasks: int = 0
    episodes: int = 0
    without_teacher: int = 0
    dropped: int = 0


async def measure_gap(
    run: Run,
    *,
    episodes: int,
    seed: int,
    tasks: int | None = None,
    teacher: tuple[Learner, Weights] | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> Gap:
    """Play training tasks as in training, and re-score them with the teacher under the contexts available now.

    Args:
        episodes: per task.
        tasks: only this many tasks, drawn with the seed; None takes all.
        teacher: the learner and weights to score with; None for the run's teacher.
    """
    chosen = list(run.task_set.tasks(TRAIN_SPLIT))
    if tasks is not None and tasks < len(chosen):
        chosen = random.Random(derive_seed(seed, "gap tasks")).sample(chosen, tasks)
    found = select_contexts(run, chosen)
    taught = [task for task in chosen if found[task.id].skill and found[task.id].text is not None]
    options = run.config.rollout
    played = await collect(
        run.student,
        run.task_set,
        taught,
        run.budget,
        group_size=episodes,
        seed=derive_seed(seed, "gap"),
        retries=options.retries,
        concurrency=options.concurrency,
        on_episode=on_episode,
    )
    gap = Gap(without_teacher=len(chosen) - len(taught), dropped=len(played.dropped))
    for group in played.groups:
        skill, text = found[group.task.id].skill, found[group.task.id].text
        assert skill is not None
        assert text is not None
        seen = [teacher_sequence(trajectory, text, run.renderer) for trajectory in group.trajectories]
        if max(len(sequence.tokens) for sequence in seen) > run.engine.max_length:
            gap.without_teacher += 1
            continue
        gap.tasks, gap.episodes = gap.tasks + 1, gap.episodes + len(group.trajectories)
        for trajectory, sequence in zip(group.trajectories, seen, strict=True):
            from_success = skill.source_outcome is Outcome.SOLVED
            gap.turns += await turn_gaps(
                trajectory,
                sequence,
                run.learner,
                teacher or (run.learner, "teacher"),
                options.temperature,
                from_success,
            )
    return gap


async def turn_gaps(
    trajectory: Trajectory,
    seen: TokenSequence,
    student: Learner,
    teacher: tuple[Learner, Weights],
    temperature: float,
    from_success: bool = True,
) -> list[TurnGap]:
    """The gaps of one trajectory's turns. One trajectory is scored at a time, since ``[tokens, vocab]`` is large.

    Args:
        seen: the trajectory under the teacher's prompt, see `teacher_sequence`.
        teacher: the learner and weights to compare the student with.
    """
    if not trajectory.turns:
        return []
    own_sequence = TokenSequence(trajectory.tokens, trajectory.action_mask)
    [pi] = await student.logprobs([own_sequence], temperature=temperature, want=WHOLE)
    [q] = await teacher[0].logprobs([seen], teacher[1], temperature=temperature, want=WHOLE)
    assert pi.distribution is not None
    assert q.distribution is not None
    log_ratio = pi.chosen - q.chosen
    kl = ESTIMATORS["reverse_kl"].terms(pi, q, pi.chosen).value  # the exact divergence does not use pi_old
    moved = pi.distribution.argmax(1) != q.distribution.argmax(1)
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
                log_ratio=float(log_ratio[here].sum()),
                abs_log_ratio=float(log_ratio[here].abs().sum()),
                kl=float(kl[here].sum()),
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
    """A row for each non-empty split and range of turns: means per token, and ``turns_moved``, the share of turns in
    which the teacher's most likely token differs somewhere (decoding greedily, it would have acted differently)."""
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
