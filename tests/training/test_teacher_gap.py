"""The gap between teacher and student, against a plain computation."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch
from toy_env import Toy
from toy_run import MakeRun, go

from skillsd.engines.base import Engine, Learner, TokenSequence
from skillsd.engines.options import EngineSpec
from skillsd.engines.torch.options import TorchOptions
from skillsd.objective import WHOLE
from skillsd.prompting.renderer import ChatRenderer
from skillsd.rollouts.collect import collect
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.training.batch import teacher_sequence
from skillsd.training.run import Run
from skillsd.training.teacher_gap import Gap, TurnGap, gap_figures, measure_gap, turn_gaps


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return TorchOptions().build(EngineSpec(str(tiny_model), seed=0, device="cpu"))


def measure(run: Run, **options: object) -> Gap:
    async def sync_and_measure() -> Gap:
        await run.learner.sync_teacher()
        return await measure_gap(run, seed=0, **options)  # type: ignore[arg-type]

    return asyncio.run(sync_and_measure())


def test_teacher_with_an_empty_context_has_no_gap(make_run: MakeRun) -> None:
    run = make_run(training={"iterations": 2}, skills={"content": "empty"})
    go(run)
    gap = measure(run, episodes=3)
    assert gap.tasks
    assert gap.episodes == 3 * gap.tasks
    assert all((t.log_ratio, t.abs_log_ratio, t.kl, t.moved) == (0, 0, 0, 0) for t in gap.turns)


def test_gap_equals_a_plain_computation(engine: Engine) -> None:
    policy = EnginePolicy(engine, ChatRenderer(engine.tokenizer, engine.stop_tokens))
    budget = Budget(turns=3, turn_tokens=2, trajectory_tokens=60)
    played = asyncio.run(collect(policy, Toy(), Toy().tasks("train"), budget, group_size=2, seed=0))
    trajectory = max((t for group in played.groups for t in group.trajectories), key=lambda t: len(t.turns))
    assert len(trajectory.turns) == 3
    seen = teacher_sequence(trajectory, " Workflow: Up", policy.renderer)
    added = len(seen.tokens) - len(trajectory.tokens)
    learner = engine.learner
    gaps = asyncio.run(turn_gaps(trajectory, seen, learner, (learner, "teacher"), 0.7))
    assert [gap.number for gap in gaps] == [1, 2, 3]
    for gap, turn in zip(gaps, trajectory.turns, strict=True):
        log_ratio = absolute = kl = 0.0
        moved = 0
        for place in range(turn.start, turn.end):
            # Each token on its own, from the sequences truncated after it.
            p = last(learner, trajectory.tokens[: place + 1])
            q = last(learner, seen.tokens[: place + 1 + added])
            token = trajectory.tokens[place]
            log_ratio += float(p[token] - q[token])
            absolute += abs(float(p[token] - q[token]))
            kl += sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            moved += int(p.argmax() != q.argmax())
        assert gap.tokens == turn.end - turn.start
        assert gap.log_ratio == pytest.approx(log_ratio, abs=1e-4)
        assert gap.abs_log_ratio == pytest.approx(absolute, abs=1e-4)
        assert gap.kl == pytest.approx(kl, abs=1e-4)
        assert gap.kl > 0
        assert gap.moved == moved


def last(learner: Learner, tokens: tuple[int, ...]) -> torch.Tensor:
    """Log-probs ``[vocab]`` of the last token's place."""
    mask = (*[False] * (len(tokens) - 1), True)
    [found] = asyncio.run(learner.logprobs([TokenSequence(tokens, mask)], temperature=0.7, want=WHOLE))
    assert found.distribution is not None
    return found.distribution[0]


def test_measuring_a_gap_records_nothing(make_run: MakeRun) -> None:
    run = make_run(training={"iterations": 2})
    go(run)
    before = run.bank.skills()
    gap = measure(run, episodes=2)
    assert run.bank.skills() == before
    assert gap.tasks == len({skill.task_id for skill in before})
    assert gap.tasks + gap.without_teacher == 7
    assert any(turn.kl > 0 for turn in gap.turns)
    few = measure(run, episodes=1, tasks=2)
    assert few.tasks + few.without_teacher == 2


def test_gap_to_another_teacher(make_run: MakeRun, engine: Engine) -> None:
    run = make_run(training={"iterations": 2})
    go(run)
    gap = measure(run, episodes=2)
    assert measure(run, episodes=2, teacher=(run.learner, "student")).turns == gap.turns  # just synchronised
    base = measure(run, episodes=2, teacher=(engine.learner, "student"))
    assert [t.number for t in base.turns] == [t.number for t in gap.turns]
    assert base.turns != gap.turns


def test_rows_are_means_over_tokens() -> None:
    turns = [
        TurnGap(1, True, True, tokens=3, log_ratio=1.0, abs_log_ratio=2.0, kl=0.5, moved=2),
        TurnGap(2, False, True, tokens=1, log_ratio=-2.0, abs_log_ratio=2.0, kl=0.5, moved=0),
        TurnGap(25, False, False, tokens=4, log_ratio=0.0, abs_log_ratio=0.0, kl=0.0, moved=1),
    ]
    rows = {(row["split"], row["turns"]): row for row in gap_figures(turns)}
    assert [turns for split, turns in rows if split == "all"] == ["all", "1-2", "21-"]
    first = rows["all", "1-2"]
    assert (first["count"], first["tokens"]) == (2, 4)
    assert (first["log_ratio"], first["abs_log_ratio"], first["kl"]) == (-0.25, 1.0, 0.25)
    assert (first["tokens_moved"], first["turns_moved"]) == (0.5, 0.5)
    assert rows["episode solved", "all"]["tokens"] == 3
    assert rows["skill from a failure", "all"]["tokens"] == 4
    assert ("skill from a failure", "1-2") not in rows
