"""`skillsd` on the workload: whole iterations of its own training loop, GRPO and Skill-SD, and rollouts alone."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
import workload as work

from skillsd.config import RunConfig
from skillsd.engines.base import TokenSequence, TrainItem
from skillsd.engines.torch.engine import TorchEngine
from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.objective import ACTION_MASK, IMITATION_MASK, SAMPLER_DIFF, TEACHER_MASK, Objective, group_advantages
from skillsd.rollouts.collect import Collected, collect
from skillsd.rollouts.policy import Budget
from skillsd.runs.build import build, make_engine
from skillsd.training import loop
from skillsd.training.run import Run
from skillsd.types import Message, Skill, Task, Trajectory

MICRO_BATCH_TOKENS = 2048
"""About as many as the peers' 8 sequences of 8 turns have. The gradient does not depend on it."""


class Echo(Environment):
    """The workload's environment. `seconds`: how long a step takes."""

    def __init__(self, turns: int, seconds: float) -> None:
        self._turns, self._seconds = turns, seconds

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        self._task, self._turn = task.payload["task"], 0
        return (Message("user", work.prompt(self._task)),)

    async def step(self, action: str) -> Step:
        if self._seconds:
            await asyncio.sleep(self._seconds)
        self._turn += 1
        return Step(work.observation(self._task, self._turn - 1), self._turn == self._turns, work.reward(action), False)


class EchoTasks(TaskSet):
    name: ClassVar[str] = "echo"

    def __init__(self, turns: int, seconds: float = 0.0) -> None:
        self.turns, self._seconds = turns, seconds

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "tune")

    @property
    def max_turns(self) -> int:
        return self.turns

    def tasks(self, split: str) -> Sequence[Task]:
        ids = [work.task_id(i) if split == "train" else f"{split}-{i}" for i in range(work.TASKS)]
        return [Task(name, "echo", split, {"task": i}) for i, name in enumerate(ids)]

    def make(self) -> Environment:
        return Echo(self.turns, self._seconds)

    def summariser(self) -> Any:
        def write(trajectory: Trajectory) -> Skill:
            return Skill("", "", f"say {trajectory.reward:.3f} and {trajectory.seed % 97}".ljust(90, "."))

        return write


class Silent:
    iteration = evaluation = note = trajectories = staticmethod(lambda *_: None)


def make_run(model: str, folder: Path, method: str, turns: int) -> Run:
    config = RunConfig.model_validate({
        "name": "bench",
        "method": method,
        "model": {"name": model, "threads": 1},
        "rollout": {
            "tasks_per_iteration": work.TASKS, "group_size": work.EPISODES,
            "turn_tokens": work.TOKENS_A_TURN, "trajectory_tokens": work.MAX_LENGTH,
        },
        "training": {"iterations": 1000, "learning_rate": 1e-6, "micro_batch_tokens": MICRO_BATCH_TOKENS},
        "log": {"tensorboard": False, "trajectories_every": 0},
    })  # fmt: skip
    engine = make_engine(config)
    folder.mkdir()
    run = build(config, folder, engine=engine, task_set=EchoTasks(turns))
    # The end of a turn is a token like any other, so that a turn has exactly 8, and the template's comes after them.
    # Set after `build`, which refuses a model whose turns nothing ends.
    learner: Any = engine.learner
    learner.stop_tokens = frozenset()
    for decoder in learner.decoders.values():
        decoder.set_stop_tokens(frozenset())
    run.renderer._stop_texts.clear()
    return run


class Meter:
    """CPU and wall-clock seconds of a run's phases, and the tokens that each processed."""

    def __init__(self, run: Run) -> None:
        self.run, self.clock = run, work.Clock()
        self.tokens: dict[str, int] = {}
        self.last_call: tuple[Any, ...] = ()
        """Arguments of the last call to the learner's `logprobs`."""
        learner: Any = run.learner
        logprobs, forward_backward, step = learner.logprobs, learner.forward_backward, learner.step

        async def timed_logprobs(sequences: Any, weights: str = "student", **options: Any) -> Any:
            self.last_call = (sequences, weights, options)
            with self.clock("teacher"):
                return await logprobs(sequences, weights, **options)

        async def timed_forward_backward(items: Any, *arguments: Any, **options: Any) -> Any:
            self.tokens["trained"] += sum(item.sequence.marked for item in items)
            self.tokens["sequence"] += sum(len(item.sequence.tokens) for item in items)
            with self.clock("update"):
                return await forward_backward(items, *arguments, **options)

        async def timed_step(learning_rate: float) -> Any:
            with self.clock("update"):
                return await step(learning_rate)

        learner.logprobs, learner.forward_backward, learner.step = timed_logprobs, timed_forward_backward, timed_step
        self._logprobs = logprobs

    async def iterate(self) -> dict[str, Any]:
        """One iteration: its seconds by phase and its tokens."""

        @wraps(collect)
        async def timed(*arguments: Any, **options: Any) -> Collected:
            with self.clock("rollout"):
                collected = await collect(*arguments, **options)
            self.tokens["sampled"] += sum(t.action_tokens for group in collected.groups for t in group.trajectories)
            return collected

        self.tokens = {"sampled": 0, "trained": 0, "sequence": 0}
        loop.collect = timed
        try:
            with self.clock("step"):
                rollouts = await loop.rollout_phase(self.run, self.run.iteration, Silent())
                record = await loop.learn_phase(self.run, rollouts, Silent())
        finally:
            loop.collect = collect
        gap = record[f"{SAMPLER_DIFF}/max"]
        if not gap < 1e-4:
            raise RuntimeError(f"log-probs when sampled and when trained differ by {gap}: the rollout was wrong")
        return {**self.clock.take(), "tokens": self.tokens, "gap": gap}

    async def teacher_alone(self) -> float:
        """CPU seconds of the teacher's forward pass over the last scored sequences, and nothing else."""
        sequences, weights, options = self.last_call
        await self.run.learner.sync_teacher()
        begin = time.process_time()
        await self._logprobs(sequences, weights, **options)
        return time.process_time() - begin


async def warm_up(meters: Sequence[Meter], turns: int) -> None:
    """Two iterations of 2 turns each: the second is the first with skills in the bank. Then set `turns` turns."""
    for meter in meters:
        tasks: Any = meter.run.task_set
        tasks.turns = 2
        for _ in range(2):
            await meter.iterate()
        tasks.turns = turns


# ----------------------------------------------------------------------------------------------------- the jobs


def step(model: str, method: str, turns: int, steps: int) -> dict[str, Any]:
    """Whole iterations."""
    with tempfile.TemporaryDirectory() as name:
        meter = Meter(make_run(model, Path(name) / "run", method, turns))
        before = work.peak_mib()

        async def go() -> list[dict[str, Any]]:
            await warm_up([meter], turns)
            return [await meter.iterate() for _ in range(steps)]

        measured = asyncio.run(go())
        meter.run.close()
    return {"steps": measured, "peak_before_mib": before}


def pair(model: str, turns: int, steps: int) -> dict[str, Any]:
    """GRPO and Skill-SD in turn in one process, and the teacher's pass alone, so noise hits all three alike."""
    with tempfile.TemporaryDirectory() as name:
        meters = {method: Meter(make_run(model, Path(name) / method, method, turns)) for method in ("grpo", "skill-sd")}

        async def go() -> list[dict[str, float]]:
            await warm_up(list(meters.values()), turns)
            rows = []
            for number in range(steps):
                order = ["grpo", "skill-sd"] if number % 2 else ["skill-sd", "grpo"]
                row = {method: (await meters[method].iterate())["cpu"]["step"] for method in order}
                rows.append({**row, "teacher": await meters["skill-sd"].teacher_alone()})
            return rows

        rows = asyncio.run(go())
        for meter in meters.values():
            meter.run.close()
    return {"pairs": rows}


def rollout(model: str, turns: Sequence[int], environment_seconds: Sequence[float] = (0.0,)) -> dict[str, Any]:
    """Rollouts alone: for each number of turns, with each delay of the environment's steps."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        run = make_run(model, Path(name) / "run", "grpo", max(turns))

        async def go(count: int, seconds: float) -> dict[str, Any]:
            clock, tasks = work.Clock(), EchoTasks(count, seconds)
            budget = Budget(turns=count, turn_tokens=work.TOKENS_A_TURN, trajectory_tokens=work.MAX_LENGTH)
            with clock("rollout"):
                collected = await collect(
                    run.policy, tasks, tasks.tasks("train"), budget, group_size=work.EPISODES, seed=count
                )
            sampled = sum(t.action_tokens for group in collected.groups for t in group.trajectories)
            return {**clock.take(), "turns": count, "environment_seconds": seconds, "tokens": {"sampled": sampled}}

        asyncio.run(go(2, 0.0))  # warm-up
        for count in turns:
            results += [asyncio.run(go(count, seconds)) for seconds in environment_seconds]
        run.close()
    return {"rollouts": results}


def loss(model: str) -> dict[str, Any]:
    """Two updates on the given batch, with the engine and the objective of training."""
    engine = TorchEngine(model, betas=work.BETAS, weight_decay=0.0, max_grad_norm=work.CLIP_NORM)
    return {"updates": asyncio.run(_updates(engine))}


async def _updates(engine: TorchEngine) -> list[dict[str, Any]]:
    template = Objective(lambda_sdl=0.0, clip_low=work.CLIP_RATIO, clip_high=work.CLIP_RATIO).template
    groups = work.loss_batch(engine.tokenizer)
    sequences = [
        TokenSequence((*e.prompt, *e.completion), (*[False] * len(e.prompt), *map(bool, e.mask)))
        for group in groups
        for e in group
    ]
    advantages = [a for group in groups for a in group_advantages([e.reward for e in group], scale_by_std=False)]
    old = [scored.chosen for scored in await engine.logprobs(sequences)]
    items = [
        TrainItem(sequence, {
            "old_logprobs": logprobs, "advantages": torch.full_like(logprobs, float(advantage)),
            "teacher_logprobs": torch.zeros_like(logprobs),
            ACTION_MASK: torch.ones_like(logprobs, dtype=torch.bool),
            TEACHER_MASK: torch.zeros_like(logprobs, dtype=torch.bool),
            IMITATION_MASK: torch.zeros_like(logprobs, dtype=torch.bool),
        })
        for sequence, logprobs, advantage in zip(sequences, old, advantages, strict=True)
    ]  # fmt: skip
    bound = template.bind(item.signals for item in items)
    updates = []
    for _ in range(2):
        parts: list[float] = []

        def recorded(student: Any, signals: Any, parts: list[float] = parts) -> Any:
            value, metrics = bound(student, signals)
            parts.append(value.item())
            return value, metrics

        await engine.forward_backward(items, recorded)
        norm = (await engine.step(work.LEARNING_RATE)).grad_norm
        updates.append({"loss": sum(parts), "grad_norm": norm, "trained": bound.counts[ACTION_MASK]})
    return updates


if __name__ == "__main__":
    work.contestant({"step": step, "pair": pair, "rollout": rollout, "loss": loss})
