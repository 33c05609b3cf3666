"""Time the parts of decoding on a GPU: `python benchmarks/decode.py` (PYTHONPATH=src:tests). Random weights."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engines import tiny

from skillsd.engines.base import SampleRequest
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.static_steps import StaticSteps

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": (
        "Llama",
        dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
             num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    ),
    "Qwen3-4B": (
        "Qwen3",
        dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
             num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    ),
    "toy": ("Llama", dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, vocab_size=1000)),
}  # fmt: skip


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - BEGIN:6.1f} s]", *words, flush=True)


def load(shape: str, device: str, **options: Any) -> TorchEngine:
    kind, sizes = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        common = {"max_position_embeddings": 32768, "pad_token_id": 0, "bos_token_id": None, "dtype": "bfloat16"}
        torch.set_default_device(device)  # random weights are made there
        torch.set_default_dtype(torch.bfloat16)
        try:
            tiny.write(Path(folder), kind, {**common, **sizes})
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        engine = TorchEngine(folder, dtype="bfloat16", device=device, **options)
    engine.optimiser.masters.clear()  # nothing is trained here
    for decoder in engine.decoders.values():
        decoder.set_stop_tokens(frozenset())
    return engine


def wait(engine: TorchEngine) -> float:
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


async def turn(engine: TorchEngine, episodes: int, prompt: int, prompts: int, most: int) -> float:
    """Seconds that new episodes take for their first turn."""
    engine.forget_caches()
    begin = wait(engine)
    await asyncio.gather(
        *(
            engine.sample(
                SampleRequest(
                    tuple([30 + i % prompts, *[40 + j % 200 for j in range(prompt - 1)]]), most, i, 1.0, f"e{i}"
                )
            )
            for i in range(episodes)
        )
    )
    return wait(engine) - begin


def per_step(engine: TorchEngine, slots: int, length: int, attention: str, graphs: bool) -> float:
    """Seconds of one step with all slots at `length` tokens, without the host's part."""
    steps = engine.decoders["student"].steps
    assert isinstance(steps, StaticSteps)
    steps._attention, kept = attention, steps._graphs
    if not graphs:
        steps._graphs = None
    with torch.inference_mode():
        steps.reserve(slots, length)
        steps._state.zero_()
        steps._state[1, :slots], steps._state[2, :slots] = length - 1, 1
        steps._state.view(torch.float64)[3, :slots] = 1.0

        def one() -> None:
            steps._state[4], steps._state[1, :slots] = 0, length - 1
            steps._run("decode", slots, 1, steps._length(length))

        for _ in range(3):
            one()
        count = 20 if graphs or engine.device.type == "cpu" else 5
        begin = wait(engine)
        for _ in range(count):
            one()
        seconds = (wait(engine) - begin) / count
    steps._graphs = kept
    if kept is not None:
        kept.clear()
    return seconds


async def shape(name: str, device: str, quick: bool) -> None:
    engine = load(name, device)
    say(name, "loaded;", type(engine.decoders["student"].steps).__name__)
    small = name != "Qwen3-4B"
    cases = [(8, 200), (64, 200), (256, 200)] if small else [(64, 4096)]
    for episodes, prompt in cases[: 1 if quick else None]:
        for label in ("first", "again"):
            first = await turn(engine, episodes, prompt, 8 if small else 1, 1)
            more = await turn(engine, episodes, prompt, 8 if small else 1, 65)
            say(
                f"{name} {episodes} episodes of {prompt} ({label}): prefill, sharing and 1 token {first * 1e3:.1f} ms; "
                f"{(more - first) / 64 * 1e3:.3f} ms a token"
            )
        engine.forget_caches()
    steps = engine.decoders["student"].steps
    if isinstance(steps, StaticSteps):
        for slots, length in [(episodes, prompt + 65) for episodes, prompt in cases][: 1 if quick else None]:
            for attention in ("fused", "biased", "products"):
                for graphs in (True, False) if attention == "fused" else (True,):
                    if steps._graphs is None and graphs and device == "cuda":
                        continue
                    took = per_step(engine, slots, length, attention, graphs)
                    read = steps.pool.bytes() / steps.pool.rows / steps.pool.capacity * slots * length
                    read += sum(p.numel() * p.element_size() for p in engine.model.parameters())
                    say(
                        f"{name} step of {slots} x {length}, {attention}, {'graph' if graphs else 'eager'}: "
                        f"{took * 1e3:.3f} ms, {read / took / 1e12:.3f} TB/s of weights, keys and values"
                    )
        if steps._graphs is not None:
            say("captured:", not steps._graphs.failed)
    if device == "cuda":
        say(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


BEGIN = time.perf_counter()
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["SmolLM2-135M", "Qwen3-4B"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    for each in args.shapes:
        asyncio.run(shape(each, args.device, args.quick))
