"""Skill-SD minibatches for two engines to be compared on, and what can be seen of a step."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skillsd.engines.base import Engine, Learner, StepReport, TokenSequence, TrainItem
from skillsd.engines.torch import lm_head, state
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.options import TorchOptions
from skillsd.engines.torch.ranks.group import rank
from skillsd.engines.torch.ranks.leader import Leader
from skillsd.engines.torch.ranks.orders import Ranks
from skillsd.engines.torch.ranks.rank import RankEngine
from skillsd.objective import Objective
from skillsd.objective.loss import ACTION_MASK, IMITATION_MASK, TEACHER_MASK

OPTIONS: dict[str, Any] = {"device": "cpu", "micro_batch_tokens": 120, "max_grad_norm": float("inf")}


def one_process(folder: str | Path, **options: Any) -> Engine:
    torch.manual_seed(1)
    engine = TorchEngine(str(folder), **{**OPTIONS, **options})
    return Engine(engine, engine, "torch", TorchOptions.capabilities)


def in_ranks(ranks: Ranks, shard: str, folder: str | Path, **options: Any) -> Engine:
    given = {**OPTIONS, "seed": 1, "threads": 1, "in_thread": False, "max_sessions": 64, **options}
    leader = Leader(ranks, shard, str(folder), **given)
    return Engine(leader, leader, "torch", TorchOptions.capabilities)


def set_most_logits(most: int) -> None:
    lm_head.MAX_LOGITS = most


class NoRoom:
    """In rank 1, passes of several sequences with too many tokens run out of memory once their work is done."""

    def __init__(self) -> None:
        self._most, self._failed = 1 << 30, 0
        self._real = {name: getattr(RankEngine, name) for name in ("_score_pass", "_train_pass")} if rank() == 1 else {}
        for name in self._real:
            setattr(RankEngine, name, self._limited(name))

    def _limited(self, name: str) -> Any:
        def compute(engine: Any, part: Sequence[Any], shared: Sequence[int], *how: Any) -> Any:
            found = self._real[name](engine, part, shared, *how)
            tokens = sum(len(getattr(one, "sequence", one).tokens) for one in part) - sum(shared)
            if len(part) > 1 and tokens > self._most:
                self._failed += 1
                raise MemoryError("no room")
            return found

        return compute

    def allow(self, tokens: int) -> int:
        """The most tokens of a pass from now on; returns how many passes have failed in this rank so far."""
        self._most = tokens
        return self._failed

    def end(self) -> int:
        for name, real in self._real.items():
            setattr(RankEngine, name, real)
        return self._failed


def ids(count: int, seed: float) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(30, 256), k=count))


def episodes(groups: int = 3, size: int = 3) -> list[tuple[int, TokenSequence]]:
    """Ragged multi-turn episodes, (group, sequence), some of them with a common first turn."""
    made = []
    for group in range(groups):
        prompt = ids(25 + 7 * group, 1000 + group)
        for member in range(size):
            tokens, mask = list(prompt), [False] * len(prompt)
            rng = random.Random(group * 100 + (member or 1))
            for turn in range(rng.randint(1, 5) if member else 1):
                said, heard = rng.randint(1, 9), rng.randint(2, 12)
                tokens += [*ids(said, group + turn), *ids(heard, rng.random())]
                mask += [True] * said + [False] * heard
            made.append((group, TokenSequence(tuple(tokens), tuple(mask))))
    return made


async def items(learner: Learner, objective: Objective, played: list[tuple[int, TokenSequence]]) -> list[TrainItem]:
    """One group has no teacher; pi_old is off by some noise, so that clips bite."""
    taught = [TokenSequence(ids(11, 500 + g) + s.tokens, (False,) * 11 + s.mask) for g, s in played]
    teacher = await learner.logprobs(taught, "teacher", want=objective.want)
    student = await learner.logprobs([s for _, s in played])
    made = []
    for number, (group, sequence) in enumerate(played):
        generator = torch.Generator().manual_seed(number)
        count = sequence.marked
        here = torch.full((count,), True)
        signals = {
            "old_logprobs": student[number].chosen + 0.2 * torch.randn(count, generator=generator),
            "advantages": torch.full((count,), float(number % 3) - 0.8),
            "teacher_logprobs": teacher[number].chosen,
            ACTION_MASK: here,
            TEACHER_MASK: here if group else ~here,
            IMITATION_MASK: ~here,
        }
        if teacher[number].distribution is not None:
            signals["teacher_distribution"] = teacher[number].distribution
        if teacher[number].candidates is not None:
            signals["candidates"] = teacher[number].candidates
        made.append(TrainItem(sequence, signals))
    return made


@dataclass(frozen=True, repr=False)  # asyncio would write all tensors into a message
class Seen:
    """What can be seen of some steps.

    Attributes:
        gradient: of the first, the whole of it, by AdamW's first moment.
        losses: by step.
        saved: the file of the state after the last one.
    """

    gradient: list[Tensor]
    losses: list[float]
    reports: list[StepReport]
    saved: dict[str, Any]


def steps(
    engine: Engine,
    folder: Path,
    objective: Objective,
    count: int = 2,
    rate: float = 1.0,
    played: list[tuple[int, TokenSequence]] | None = None,
) -> Seen:
    """A few steps of Skill-SD; the states after the first and the last are saved in `folder`."""

    async def run() -> Seen:
        losses, reports, gradient = [], [], []
        for number in range(count):
            await engine.learner.sync_teacher(1.0 if number == 0 else rate)
            batch = await items(engine.learner, objective, played or episodes())
            loss = objective.template.bind(item.signals for item in batch)
            metrics = await engine.learner.forward_backward(batch, loss)
            losses.append(metrics["policy_loss"].value)  # type: ignore[union-attr]
            reports.append(await engine.learner.step(3e-3))
            if number == 0:
                (folder / "first").mkdir(parents=True)
                await engine.learner.save_state(folder / "first")
                gradient = moments(folder / "first")
        (folder / "last").mkdir()
        await engine.learner.save_state(folder / "last")
        return Seen(gradient, losses, reports, read(folder / "last"))

    return asyncio.run(run())


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / state.FILE, weights_only=True)
    return found


def moments(folder: Path) -> list[Tensor]:
    return [moment["exp_avg"] for moment in read(folder)["optimiser"]["adamw"]["state"].values()]


def relative_gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of all."""
    most = max(t.abs().max().item() for t in expected)
    assert most > 0
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)) / most
