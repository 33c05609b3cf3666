"""What `gpu.py` measures, part by part, through the public interfaces of engines and runs."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_models
import torch
from gpu_models import Made

from skillsd.config import RunConfig
from skillsd.engines.base import Engine, Sample, SampleRequest, TokenSequence, TrainItem
from skillsd.engines.conformance.kit import WEIGHTED
from skillsd.engines.torch.options import TorchOptions
from skillsd.objective import SAMPLER_DIFF
from skillsd.runs.build import build, make_engine
from skillsd.training.loop import learn_phase, rollout_phase

if TYPE_CHECKING:
    from gpu import Bench

Run = Callable[[Awaitable[Any]], Any]


def prompts(count: int, length: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random token ids, without control tokens."""
    return [tuple(random.Random(seed * 10_000 + i).choices(range(3, 300), k=length)) for i in range(count)]


class Episodes:
    """Sessions that go on turn by turn, all at once."""

    def __init__(self, built: Engine, starts: Sequence[tuple[int, ...]], temperature: float = 1.0) -> None:
        self.engine, self.temperature = built, temperature
        self.tokens = [list(start) for start in starts]
        self.sampled: list[list[tuple[int, float]]] = [[] for _ in starts]
        """Of each episode, the sampled tokens' places and log-probs."""
        self.turns = 0

    async def turn(self, most: int, observation: int = 0) -> float:
        """Sample up to `most` tokens of each, after `observation` new ones; returns the seconds."""
        self.turns += 1
        for number, tokens in enumerate(self.tokens):
            if observation:
                tokens += prompts(1, observation, seed=self.turns * 1000 + number)[0]
        requests = [
            SampleRequest(tuple(tokens), most, seed=number * 100 + self.turns, temperature=self.temperature,
                          session=f"episode {number}")
            for number, tokens in enumerate(self.tokens)
        ]  # fmt: skip
        begin = time.perf_counter()
        samples: list[Sample] = await asyncio.gather(*(self.engine.sampler.sample(request) for request in requests))
        spent = time.perf_counter() - begin
        for tokens, kept, sample in zip(self.tokens, self.sampled, samples, strict=True):
            kept += zip(range(len(tokens), len(tokens) + len(sample.tokens)), sample.logprobs, strict=True)
            tokens += sample.tokens
        return spent

    def end(self) -> None:
        for number in range(len(self.tokens)):
            self.engine.sampler.end_session(f"episode {number}")

    def sequences(self) -> list[TokenSequence]:
        """With the sampled tokens marked."""
        made = []
        for tokens, kept in zip(self.tokens, self.sampled, strict=True):
            places = {place for place, _ in kept}
            made.append(TokenSequence(tuple(tokens), tuple(place in places for place in range(len(tokens)))))
        return made


async def _step_seconds(episodes: Episodes, few: int, more: int) -> float:
    """Seconds of a decoding step: the difference of long and short turns, each the faster of two."""
    short = [await episodes.turn(few) for _ in range(2)]
    long = [await episodes.turn(few + more) for _ in range(2)]
    return (min(long) - min(short)) / more


def decode(bench: Bench, run: Run) -> None:
    """SmolLM2 shape: milliseconds of a decoding step."""
    made, length = bench.model("SmolLM2-135M"), 16 if bench.toy else 200
    sizes = (2, 4) if bench.toy else (8, 64, 256)
    with gpu_models.engine(made, bench.device, max_sessions=max(sizes)) as built:
        for count in sizes:
            episodes = Episodes(built, _groups(8, count, length))
            first = run(episodes.turn(4))  # captures graphs, if there are any
            slow = run(episodes.turn(4)) > 0.2
            more = 4 if bench.toy else 16 if slow or bench.quick else 64
            seconds = run(_step_seconds(episodes, 4, more))
            episodes.end()
            bench.row(f"step of {count} episodes of {length} tokens", 1e3 * seconds, "ms",
                      most=3.0 if count == 64 else None, note=f"first turn {first:.1f} s")  # fmt: skip
            bench.row(f"tokens sampled, {count} episodes", count / seconds, "tokens/s")


def prefill(bench: Bench, run: Run) -> None:
    """SmolLM2 shape: seconds to compute the prompts, without the step that follows."""
    made, length = bench.model("SmolLM2-135M"), 16 if bench.toy else 200
    sizes = (4,) if bench.toy else (64, 256)
    with gpu_models.engine(made, bench.device, max_sessions=max(sizes)) as built:
        for groups, kind in ((8, "8 prompts, shared"), (10**6, "all different")):
            for count in sizes:
                tries = []
                for number in range(3):
                    starts = _groups(min(groups, count), count, length, seed=number)
                    episodes = Episodes(built, starts)
                    first = run(episodes.turn(1))
                    tries.append(first - run(episodes.turn(1)))
                    episodes.end()
                distinct = min(groups, count)
                needed = made.flops([length] * distinct, [0] * distinct, 0)
                allowed = needed / (0.4 * bench.peak)
                name = f"prefill {count} episodes of {length} tokens, {kind}"
                bench.row(name, 1e3 * min(tries[1:]), "ms", most=2e3 * allowed if groups > count else None,
                          note=f"arithmetic of distinct tokens at 40 % of peak: {1e3 * allowed:.1f} ms")  # fmt: skip


def decode_long(bench: Bench, run: Run) -> None:
    """Qwen3-4B shape, contexts of 4k tokens: a step's share of the bandwidth roof."""
    made, length, more = bench.model("Qwen3-4B"), 32 if bench.toy else 3841, 16
    with gpu_models.engine(made, bench.device, max_sessions=64) as built:
        gpu_models.without_optimiser(built)
        gpu_models.free(bench.device)
        an_episode = 2 * made.sizes.cache * (length + 256)
        count = 4 if bench.toy else min(64, int((0.9 * bench.free() - (6 << 30)) / (1.3 * an_episode)) // 8 * 8)
        episodes = Episodes(built, _groups(8, count, length))
        bench.say(f"{count} episodes, prefill")
        run(episodes.turn(1))
        run(episodes.turn(4))
        seconds = run(_step_seconds(episodes, 4, more))
        mean = sum(map(len, episodes.tokens)) / count
        read = 2 * made.sizes.parameters + 2 * made.sizes.cache * mean * count
        name = f"step of {count} episodes of {mean:,.0f} tokens"
        bench.row(name, 1e3 * seconds, "ms", note="" if count == 64 or bench.toy else "64 episodes do not fit")
        bench.row("share of the copy bandwidth", 100 * read / seconds / bench.bandwidth, "%", least=50.0,
                  note=f"weights and caches of {read / 1e9:.0f} GB read once")  # fmt: skip


def learn(bench: Bench, run: Run, model: str, groups: int, members: int, prompt: int, length: int) -> None:
    """Scoring and an update with all weights; every other stretch of 16 tokens after the prompt is marked."""
    made = bench.model(model)
    tight = bench.device.type == "cuda" and bench.free() < 26 * made.sizes.parameters
    options: dict[str, Any] = {"micro_batch_tokens": "auto", "gradient_checkpointing": tight}
    sequences, shared = [], []
    for group in range(groups):
        [start] = prompts(1, prompt, seed=group)
        for member, rest in enumerate(prompts(members, length - prompt, seed=100 + group)):
            mask = [place >= prompt and place // 16 % 2 == 0 for place in range(length)]
            sequences.append(TokenSequence((*start, *rest), tuple(mask)))
            shared.append(prompt if member else 0)
    marked = sum(s.marked for s in sequences)
    needed = made.flops([length] * len(sequences), shared, marked)
    items = [TrainItem(s, {"weight": torch.full((s.marked,), 1 / marked)}) for s in sequences]
    with gpu_models.engine(made, bench.device, **options) as built:

        async def update(part: Sequence[TrainItem]) -> None:
            await built.learner.forward_backward(part, WEIGHTED)
            report = await built.learner.step(1e-6)
            assert report.applied

        run(update(items))  # compiles, allocates the optimiser's state
        run(built.learner.logprobs(sequences))
        for name, work, times, share in (
            ("scoring", lambda: built.learner.logprobs(sequences), 1, 40.0),
            ("update", lambda: update(items), 3, 40.0),
        ):
            bench.forget_peak()
            tries = []
            for _ in range(1 if bench.quick or bench.toy else 2):
                if tries and bench.left() < 2 * tries[0]:
                    break
                bench.sync()
                begin = time.perf_counter()
                run(work())
                bench.sync()
                tries.append(time.perf_counter() - begin)
            seconds = min(tries)
            target = share if model == "Qwen3-1.7B" else None
            bench.row(f"{name}, share of the bf16 peak", 100 * times * needed / seconds / bench.peak, "%", least=target,
                      note=f"{seconds:.2f} s, {len(sequences) * length / seconds:,.0f} tokens/s"
                      + (", recomputed activations" if tight and times == 3 else ""))  # fmt: skip
            bench.row(f"{name}, peak memory", bench.peak_memory() / 2**30, "GiB")
        budget = getattr(getattr(built.learner, "micro_batches", None), "budget", None)
        if budget is not None:
            bench.row("tokens of a micro-batch", float(budget), "tokens", note="chosen from free memory")


def sokoban(bench: Bench, run: Run) -> None:
    """The training loop on Sokoban, GRPO, 128 episodes of 20 turns: seconds an iteration."""
    made = bench.model("SmolLM2-135M")
    config = RunConfig.model_validate({
        "name": "gpu", "method": "grpo",
        "model": {"name": str(made.folder), "dtype": "bfloat16", "device": str(bench.device)},
        "environment": {"name": "sokoban", "options": {"preset": "nano"}},
        # A trained agent's reply: a move and the end of the turn.
        "rollout": {"tasks_per_iteration": 2 if bench.toy else 16, "group_size": 2 if bench.toy else 8,
                    "turn_tokens": 2, "trajectory_tokens": 2048},
        "training": {"iterations": 9, "micro_batch_tokens": "auto"},
        "log": {"tensorboard": False, "trajectories_every": 0},
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        with gpu_models.random_weights(bench.device):
            work = build(config, Path(name), engine=make_engine(config))

        async def iterate() -> dict[str, Any]:
            rollouts = await rollout_phase(work, work.iteration, Silent())
            return await learn_phase(work, rollouts, Silent())

        try:
            run(work.engine.publish())
            records = [run(iterate())]
            while len(records) < (1 if bench.toy else 4) and bench.left() > 5:  # only the first is slow
                records.append(run(iterate()))
        finally:
            work.close()
            gpu_models.free(bench.device)
    best = min(records, key=lambda record: record["time/iteration"])
    phases = ", ".join(f"{key[5:]} {value:.2f} s" for key, value in best.items() if key.startswith("time/"))
    note = f"{best['rollout/turns']:.0f} turns, {best['rollout/tokens']:.0f} tokens; {phases}"
    bench.row("an iteration of 128 episodes", best["time/iteration"], "s", most=3.0, note=note)
    bench.row("its first iteration", records[0]["time/iteration"], "s")
    for quantile in ("p50", "p99", "max"):
        bench.row(f"sampler and scorer differ by, {quantile}", best[f"{SAMPLER_DIFF}/{quantile}"], "nats")


class Silent:
    """A reporter that drops everything."""

    iteration = evaluation = note = trajectories = staticmethod(lambda *_: None)


def gap(bench: Bench, run: Run) -> None:
    """The difference of a token's log-prob when sampled and when scored, SmolLM2 shape, three turns."""
    made = bench.model("SmolLM2-135M")
    for dtype in ("bfloat16", "float32"):
        with gpu_models.engine(made, bench.device, dtype=dtype) as built:
            episodes = Episodes(built, _groups(4, 8 if bench.toy else 64, 60))
            for _ in range(3):
                run(episodes.turn(4 if bench.toy else 16, observation=20))
            episodes.end()
            scored = run(built.learner.logprobs(episodes.sequences()))
        ours = torch.tensor([logprob for kept in episodes.sampled for _, logprob in kept], dtype=torch.float64)
        difference = (torch.cat([one.chosen for one in scored]).double() - ours).abs()
        for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)):
            value = difference.quantile(q).item()
            bench.row(f"{dtype}, {name}", value, "nats", most=1e-3 if dtype == "float32" and q == 1 else None)
        bench.row(f"{dtype}, equal to the bit", 100 * (difference == 0).double().mean().item(), "%")


def equality(bench: Bench, run: Run) -> None:
    """The static decoding step against the plain one: same seeds, ragged prompts, two turns."""
    if "decode" not in TorchOptions.model_fields:
        bench.say("this version has no engine.decode")
        return
    made = bench.model("SmolLM2-135M")
    starts = [tokens[: 20 + 7 * i] for i, tokens in enumerate(prompts(4 if bench.toy else 24, 200, seed=5))]
    for dtype in ("float32", "bfloat16"):
        found = {}
        for kind in ("plain", "static"):
            with gpu_models.engine(made, bench.device, dtype=dtype, decode=kind) as built:
                episodes = found[kind] = Episodes(built, starts)
                for most in (8, 4) if bench.toy else (32, 16):
                    run(episodes.turn(most, observation=5))
                episodes.end()
        tokens = same = 0
        worst = 0.0
        for number, plain in enumerate(found["plain"].sampled):
            ids = [found[kind].tokens[number] for kind in ("plain", "static")]
            for (place, ours), (other, theirs) in zip(plain, found["static"].sampled[number], strict=False):
                tokens += 1
                if place != other or ids[0][: place + 1] != ids[1][: place + 1]:
                    continue
                same += 1
                worst = max(worst, abs(ours - theirs))
        exact = dtype == "float32"
        bench.row(f"{dtype}, same tokens", 100 * same / tokens, "%", least=100.0 if exact else None)
        bench.row(f"{dtype}, log-probs differ by at most", worst, "nats", most=1e-4 if exact else None)


def _groups(groups: int, count: int, length: int, seed: int = 0) -> list[tuple[int, ...]]:
    """`count` prompts, of which `groups` are different (fewer if there are fewer)."""
    made = prompts(min(groups, count), length, seed=seed + 50)
    return [made[i * len(made) // count] for i in range(count)]


def parts(bench: Bench, run: Run) -> dict[str, tuple[float, Callable[[], None]]]:
    """Name -> its share of the time, and the measurement."""
    toy = bench.toy
    small = (2, 2, 8, 24) if toy else (16, 8, 128, 512)
    large = (2, 2, 8, 24) if toy else (2, 8, 256, 2048) if bench.quick else (8, 8, 256, 2048)
    return {
        "decode": (50, lambda: decode(bench, run)),
        "prefill": (20, lambda: prefill(bench, run)),
        "sokoban": (45, lambda: sokoban(bench, run)),
        "gap": (15, lambda: gap(bench, run)),
        "equality": (30, lambda: equality(bench, run)),
        "learn-135m": (25, lambda: learn(bench, run, "SmolLM2-135M", *small)),
        "learn-1.7b": (55, lambda: learn(bench, run, "Qwen3-1.7B", *large)),
        "decode-4b": (45, lambda: decode_long(bench, run)),
    }


__all__ = ["Made", "parts"]
