"""Where an iteration's time goes: rollout, teacher's pass, update; sampled tokens a second; peak memory.

The workload is that of a multi-turn agent in small: a random Qwen3-type model (hidden 192, 6 layers, 2.6 M
parameters, byte-level vocabulary), 8 tasks x 8 episodes, T turns of exactly 8 sampled tokens (no end of turn can be
sampled), a prompt of about 99 tokens, observations of 24-32 tokens; float32, one thread. Methods alternate within a
round, so a noisy machine disturbs all alike; figures are medians over the rounds.

    python benchmarks/rollout_and_step.py [--turns 8 24] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from skillsd.config import RunConfig
from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.types import Message, Skill, Task, Trajectory

TOKENS_A_TURN = 8
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Echo(Environment):
    """Answers anything with 20 to 28 characters, until its turns are over."""

    def __init__(self, turns: int) -> None:
        self._turns = turns

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        self._random, self._left = random.Random(seed), self._turns
        return (Message("user", (task.id + " ").ljust(96, "x")),)

    async def step(self, action: str) -> Step:
        self._left -= 1
        length = 20 + int(self._random.random() * 9)
        score = (len(action) % 7) / 6
        return Step("o" * length, self._left == 0, score, False)


class EchoTasks(TaskSet):
    name: ClassVar[str] = "echo"

    def __init__(self, turns: int) -> None:
        self._turns = turns

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "tune")

    @property
    def max_turns(self) -> int:
        return self._turns

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(f"{split}-{i}", "echo", split) for i in range(8)]

    def make(self) -> Environment:
        return Echo(self._turns)

    def summariser(self) -> Any:
        def write(trajectory: Trajectory) -> Skill:
            return Skill("", "", f"say {trajectory.score:.3f} and {trajectory.seed % 97}".ljust(90, "."))

        return write


def make_model(folder: Path) -> None:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from skillsd.training.scratch import make_tokenizer

    tokenizer: PreTrainedTokenizerFast = make_tokenizer([], 257)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=4, head_dim=48, max_position_embeddings=4096,
            tie_word_embeddings=True, eos_token_id=tokenizer.convert_tokens_to_ids("<|end|>"),
        )
    )  # fmt: skip
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|end|>")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(turns: int, method: str, rounds: int) -> dict[str, Any]:
    """Medians of an iteration's figures, after a warm-up iteration."""
    from skillsd.training.loop import iterate
    from skillsd.training.run import build, make_engine

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        config = RunConfig.model_validate(
            {
                "name": "bench",
                "method": method,
                "model": {"name": str(folder / "model"), "threads": 1},
                "rollout": {
                    "tasks_per_iteration": 8, "group_size": 8,
                    "turn_tokens": TOKENS_A_TURN, "trajectory_tokens": 4096,
                },
                "training": {"iterations": rounds + 2, "learning_rate": 1e-6, "micro_batch_tokens": 8192},
                "log": {"tensorboard": False, "trajectories_every": 0},
            }
        )  # fmt: skip
        engine = make_engine(config)
        for sampler in engine.samplers.values():  # type: ignore[attr-defined]
            sampler._stop = frozenset()  # exactly TOKENS_A_TURN tokens a turn
        run = build(config, folder, engine=engine, task_set=EchoTasks(turns))

        class Silent:
            iteration = evaluation = note = staticmethod(lambda *_: None)
            trajectories = staticmethod(lambda *_: None)

        async def go() -> list[dict[str, Any]]:
            # Two iterations of warm-up: the second one is the first whose bank has skills.
            return [await iterate(run, Silent()) for _ in range(rounds + 2)][2:]  # type: ignore[arg-type]

        records = asyncio.run(go())
        run.close()
    names = ["time/rollout", "time/teacher", "time/update", "time/iteration", "rollout/sampled_tokens_per_second"]
    figures = {name: statistics.median(record[name] for record in records) for name in names}
    figures["gap/max"] = max(record["gap/max"] for record in records)
    figures["batch/groups_with_teacher"] = records[-1]["batch/groups_with_teacher"]
    figures["sampled_tokens"] = 64 * turns * TOKENS_A_TURN
    figures["memory/peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--turns", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("TURNS", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:  # a process of its own, so that peak memory is its own
        print(json.dumps(measure(int(options.one[0]), options.one[1], options.rounds)))
        return
    results: dict[str, Any] = {}
    print(f"{'turns':>5} {'method':9} {'rollout':>9} {'teacher':>9} {'update':>9} {'tok/s':>7} {'peak MiB':>9}")
    for turns in options.turns:
        for method in ("grpo", "skill-sd"):
            command = [sys.executable, __file__, "--one", str(turns), method, "--rounds", str(options.rounds)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures = json.loads(output.splitlines()[-1])
            results[f"{turns} turns, {method}"] = figures
            print(
                f"{turns:5} {method:9} {figures['time/rollout']:8.2f}s {figures['time/teacher']:8.2f}s "
                f"{figures['time/update']:8.2f}s {figures['rollout/sampled_tokens_per_second']:7.0f} "
                f"{figures['memory/peak_mib']:9.0f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
