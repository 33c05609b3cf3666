"""Run by the SkyRL environment's Python: a server's gradients beside the embedded engine's, with one adapter.

python skyrl_parity.py ADDRESS MODEL FOLDER    # prints JSON
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from skillsd.engines.base import SampleRequest, TokenSequence, TrainItem
from skillsd.engines.options import EngineSpec, LoraOptions
from skillsd.engines.tinker.engine import TinkerEngine
from skillsd.engines.tinker.options import TinkerOptions
from skillsd.engines.torch.engine import TorchEngine
from skillsd.objective import ACTION_MASK, IMITATION_MASK, TEACHER_MASK, Objective, group_advantages

GROUPS, MEMBERS = 3, 4


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(30, 256), k=count))


def gap(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return (torch.cat(a) - torch.cat(b)).abs().max().item()


async def scores(engine: Any, sequences: list[TokenSequence]) -> list[torch.Tensor]:
    return [one.chosen for one in await engine.logprobs(sequences)]


async def items_of(engine: Any, sequences: list[TokenSequence], old: list[torch.Tensor]) -> list[TrainItem]:
    """Random rewards; the teacher, with another beginning of the prompt, teaches all groups but the last."""
    taught = [TokenSequence(ids(11, 500) + s.tokens, (False,) * 11 + s.mask) for s in sequences]
    teacher = await scores(engine, taught)
    rewards = [float(random.Random(n).random() < 0.5) for n in range(len(sequences))]
    items = []
    for n, sequence in enumerate(sequences):
        first = n // MEMBERS * MEMBERS
        advantage = group_advantages(rewards[first : first + MEMBERS])[n - first].item()
        everywhere = torch.ones(sequence.marked, dtype=torch.bool)
        signals = {
            "old_logprobs": old[n],
            "advantages": torch.full((sequence.marked,), advantage),
            "teacher_logprobs": teacher[n],
            ACTION_MASK: everywhere,
            TEACHER_MASK: everywhere & (n // MEMBERS < GROUPS - 1),
            IMITATION_MASK: ~everywhere,
        }
        items.append(TrainItem(sequence, signals))
    return items


async def compare(address: str, folder: str, out: Path) -> dict[str, Any]:
    options = TinkerOptions(server="skyrl-jax", base_url=address)
    spec = EngineSpec(model=folder, seed=3, lora=LoraOptions(rank=8), teacher="student", max_grad_norm=torch.inf)
    options.check(spec)
    server = TinkerEngine(options, spec)
    await server.load(await server.publish())
    requests = [SampleRequest(ids(24, n // MEMBERS), 6, seed=n) for n in range(GROUPS * MEMBERS)]
    samples = await asyncio.gather(*(server.sample(request) for request in requests))
    sequences = [
        TokenSequence((*r.tokens, *s.tokens), (False,) * len(r.tokens) + (True,) * len(s.tokens))
        for r, s in zip(requests, samples, strict=True)
    ]
    await server.export(out / "adapter")
    local = TorchEngine(folder, device="cpu", lora=LoraOptions(adapter=str(out / "adapter")), max_grad_norm=torch.inf)
    old = await scores(server, sequences)
    found: dict[str, Any] = {
        "sampled minus scored": gap([torch.tensor(s.logprobs) for s in samples], old),
        "scored minus local": gap(old, await scores(local, sequences)),
        "norms": [],
    }
    items = await items_of(server, sequences, old)
    template = Objective(lambda_sdl=0.3).template
    for step in range(3):  # one datum, then the general route off policy
        loss = template.bind((item.signals for item in items), compare_with_sampler=step == 0)
        reports = []
        for engine in (server, local):
            await engine.forward_backward(items, loss)
            reports.append(await engine.step(2e-4))
        found["norms"].append([report.grad_norm for report in reports])
    found["after three steps"] = gap(await scores(server, sequences), await scores(local, sequences))
    (out / "state").mkdir()
    await server.save_state(out / "state")
    kept = await scores(server, sequences)
    resumed = TinkerEngine(options, replace(spec, seed=9))
    await resumed.load_state(out / "state")
    found["resumed"] = gap(kept, await scores(resumed, sequences))
    for engine in (server, resumed):
        engine.close()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(asyncio.run(compare(sys.argv[1], sys.argv[2], Path(sys.argv[3])))))
