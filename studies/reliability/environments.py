"""Environments that crash, hang, leak and lie, at 5 % a step: do the other groups notice? See docs/reliability.md.

    python studies/reliability/environments.py --iterations 50

Each iteration is sampled twice from the same weights and seeds, without faults and with faults in every other task, and
is trained on the second. The other tasks' trajectories (tokens, turns, rewards, outcomes) must be the same to the bit,
and so their advantages; log-probs up to rounding, as other episodes share their batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from skillsd.config import RunConfig, load
from skillsd.envs import registry
from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.rollouts.records import trajectory_to_json
from skillsd.runs.build import build
from skillsd.seeds import derive_seed
from skillsd.training.loop import learn_phase, rollout_phase
from skillsd.types import Group, Message, Skill, Task

SHARE = 0.05
"""Probability of a fault in a step."""

TOLERANCE = 1e-5
"""Of log-probs, nats: matrix products of another number of rows round differently in the last bits."""

KINDS = ("crash", "exit", "hang", "leak", "lie")
LIES: tuple[Any, ...] = (
    None,
    "done",
    Step(None, False, 0.5, False),  # type: ignore[arg-type]
    Step("x", False, math.nan, False),
    Step("x", 3, 2.0, "no"),  # type: ignore[arg-type]
)


class Faulty(Environment):
    def __init__(self, owner: FaultySet, number: int) -> None:
        self.owner, self.inner, self.number = owner, owner.inner.make(), number

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        self.task, self.seed, self.steps = task, seed, 0
        return await self.inner.reset(task, seed)

    async def step(self, action: str) -> Any:
        self.steps += 1
        draw = derive_seed(self.seed, f"{self.task.id}/{self.steps}/{self.number}") / 2**63 % 1
        if self.owner.on and self.task.id in self.owner.bad and draw < SHARE:
            kind = KINDS[int(draw / SHARE * len(KINDS))]
            self.owner.faults[kind] += 1
            if kind == "crash":
                raise ZeroDivisionError("a fault was injected")
            if kind == "exit":
                sys.exit("a fault was injected")
            if kind == "hang":
                await asyncio.sleep(3600)
            if kind == "leak":
                self.owner.leaked.append(bytearray(1 << 18))
                self.owner.left.append(asyncio.ensure_future(asyncio.sleep(3600)))
            if kind == "lie":
                return LIES[self.steps % len(LIES)]
        return await self.inner.step(action)

    async def close(self) -> None:
        await self.inner.close()


class FaultySet(TaskSet):
    """Sokoban, with faults in every other task of the training split while `on`."""

    name: ClassVar[str] = "sokoban"

    def __init__(self) -> None:
        self.inner = registry.load("sokoban", {"preset": "nano"})
        self.bad = {task.id for task in self.inner.tasks("train")[::2]}
        self.on, self.made, self.faults = False, 0, Counter[str]()
        self.leaked: list[bytearray] = []
        self.left: list[asyncio.Future[None]] = []

    @property
    def splits(self) -> tuple[str, ...]:
        return self.inner.splits

    @property
    def max_turns(self) -> int:
        return self.inner.max_turns

    def tasks(self, split: str) -> Sequence[Task]:
        return self.inner.tasks(split)

    def make(self) -> Environment:
        self.made += 1
        return Faulty(self, self.made)

    def summariser(self) -> Any:
        return self.inner.summariser()

    def golden_skill(self, task: Task) -> Skill | None:
        return self.inner.golden_skill(task)

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Any]:
        return self.inner.demonstrations(split, seed=seed, **options)


class Silent:
    iteration = evaluation = trajectories = note = staticmethod(lambda *_: None)


def compare(before: Group, after: Group) -> float | None:
    """The largest difference of log-probs; None if anything else differs."""
    records = [[trajectory_to_json(trajectory) for trajectory in group.trajectories] for group in (before, after)]
    logprobs = [[value for record in one for value in record.pop("logprobs")] for one in records]
    if records[0] != records[1]:
        return None
    return max((abs(a - b) for a, b in zip(*logprobs, strict=True)), default=0.0)


async def campaign(iterations: int, folder: Path) -> dict[str, Any]:
    settings = ["rollout.tasks_per_iteration=8", "rollout.step_seconds=0.5", "log.tensorboard=false", "seed=5"]
    config = load(RunConfig, "sokoban-nano", [*settings, f"training.iterations={iterations}"])
    task_set = FaultySet()
    run = build(config, folder, task_set=task_set)
    compared = changed = dropped = 0
    largest = 0.0
    begin = time.monotonic()
    await run.engine.publish()
    for number in range(iterations):
        visits = dict(run.visits)
        clean = await rollout_phase(run, number, Silent())
        run.visits, task_set.on = visits, True
        rollouts = await rollout_phase(run, number, Silent())
        task_set.on = False
        after = {group.task.id: group for group in rollouts.groups}
        for group in clean.groups:
            if group.task.id in task_set.bad:
                continue
            difference = compare(group, after[group.task.id]) if group.task.id in after else None
            compared += 1
            changed += difference is None
            largest = max(largest, difference or 0.0)
        dropped += len(clean.groups) - len(rollouts.groups)
        await learn_phase(run, rollouts, Silent())
        print(
            f"{number + 1}/{iterations}: {compared} groups compared, {changed} changed, {dropped} dropped", flush=True
        )
    for task in task_set.left:
        task.cancel()
    run.close()
    return {
        "iterations": iterations,
        "faults": dict(task_set.faults),
        "groups compared": compared,
        "groups changed": changed,
        "largest difference of log-probs": largest,
        "faulty groups dropped": dropped,
        "seconds": round(time.monotonic() - begin),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(campaign(args.iterations, Path(folder)))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    sys.exit(bool(figures["groups changed"] or figures["largest difference of log-probs"] > TOLERANCE))


if __name__ == "__main__":
    main()
