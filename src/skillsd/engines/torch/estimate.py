"""The embedded engine's estimate of a run, before it starts: memory by phase, and seconds per iteration.

It assumes that every episode uses its whole token budget. It does not model memory fragmentation on a GPU, or attention
kernels that materialise the whole attention matrix.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skillsd.engines.estimate import SAMPLING, SCORING, UPDATE, Estimate, Workload
from skillsd.engines.options import EngineSpec, LoraOptions
from skillsd.engines.torch.budget import ON_CPU, kept_per_token, one_layer, tokens_that_fit
from skillsd.engines.torch.models import DTYPES, pick_device
from skillsd.engines.torch.sizes import Sizes
from skillsd.errors import UserError

WIDTH = {"float32": 4, "bfloat16": 2}
CALLS = 60
"""Operations of one layer in one forward pass, each with a fixed cost besides its arithmetic."""
TURN = 150
"""Python's work per turn (prompt, reply, scheduling, a small environment), in operations on tiny tensors. Measured with
the tiny agent on Sokoban (docs/doctor.md)."""
POOL = 1.25
"""The pool of KV caches grows by at least a quarter at a time, so it can be this much larger than necessary."""
HOLES = 1.0
"""On a CPU with LoRA, fragmentation of glibc's heap per byte of activations: the adapters' temporary results leave
holes between activations that are kept. Measured with one model (docs/doctor.md); GPUs have another allocator."""
CHOOSE = 20
"""Further bytes per logit while sampling: float32 log-probs and two float64 (`choose`)."""
SCORE = {"chosen": 8, "top_k": 20, "whole": 12}
"""Bytes per logit while scoring, by `Want.kind`: float32 logits, log-probs and tensors derived from them."""
LEARN = {"chosen": 12, "top_k": 24, "whole": 36}
"""The same with gradients; for whole distributions, with the teacher's."""


class TorchEstimator:
    """Estimates for this machine, from its free memory and measured speed. See `skillsd.engines.estimate.Estimator`."""

    def __init__(self, spec: EngineSpec, workload: Workload) -> None:
        if spec.threads:
            torch.set_num_threads(spec.threads)
        device = pick_device(spec.device)
        self.device, self._gpu = str(device), device.type == "cuda"
        if self._gpu:
            (self.free, self.total), self._own = torch.cuda.mem_get_info(device), CUDA
        else:
            self._own = _resident()
            self.free = self.total = _free_memory() + self._own
        self._sizes: dict[str, Sizes] = {}
        rows = min(workload.episodes, spec.max_sessions)
        self._speed = measure(device, spec.dtype, rows=rows, hidden=self.sizes(spec).hidden)

    def sizes(self, spec: EngineSpec) -> Sizes:
        lora = adapter_form(spec.lora)
        targets = lora.target_modules if lora else "all-linear"
        key = f"{spec.model} {targets}"
        if key not in self._sizes:
            self._sizes[key] = Sizes.of(spec.model, targets)
        return self._sizes[key]

    def __call__(self, spec: EngineSpec, workload: Workload) -> Estimate:
        return estimate(
            spec, workload, self.sizes(spec), speed=self._speed, own=self._own, gpu=self._gpu, free=self.free
        )


CUDA = 600 << 20
"""Bytes that CUDA and its libraries need on a device."""


def _resident() -> int:
    """Bytes of this process, which has loaded everything that a run loads except the model."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 400 << 20


def _free_memory() -> int:
    """Bytes available without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def adapter_form(lora: LoraOptions | None) -> LoraOptions | None:
    """The adapter's rank and target modules: the recipe's, or those of an existing adapter's folder."""
    if lora is None or lora.adapter is None:
        return lora
    try:
        form = json.loads((Path(lora.adapter).expanduser() / "adapter_config.json").read_text(encoding="utf-8"))
        return LoraOptions(form["r"], form["lora_alpha"], form["target_modules"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"no adapter in {lora.adapter!r} (model.adapter): expected a folder with adapter_config.json, as peft "
            "writes it"
        ) from error


@dataclass(frozen=True)
class Speed:
    """A device's speed.

    Attributes:
        many, few: floating-point operations per second, for matrices with many rows (training) and with one row per
            episode (decoding).
        call: seconds of an operation on tiny tensors.
    """

    many: float
    few: float
    call: float


def estimate(
    spec: EngineSpec,
    workload: Workload,
    sizes: Sizes,
    *,
    speed: Speed | None = None,
    own: int = 0,
    gpu: bool = False,
    free: int = 0,
) -> Estimate:
    """Estimate a run with a model of these sizes.

    Args:
        own: bytes of the process before the model is loaded.
        gpu: whether the model runs on a GPU.
        free: bytes available there, for ``micro_batch_tokens=auto``.
    """
    from skillsd.engines.torch.lm_head import most_logits
    from skillsd.engines.torch.steps import PREFILL_BATCH_TOKENS

    width = WIDTH[spec.dtype]
    lora = adapter_form(spec.lora)
    if lora:
        trained, trained_width = lora.rank * sizes.adapter, 4  # peft keeps adapters in float32
    else:
        trained, trained_width = sizes.parameters, width
    masters = 0 if trained_width == 4 else trained * 4  # `MasterAdamW`: gradients are summed there, in float32
    teacher = trained * trained_width if spec.teacher == "snapshot" else 0
    if spec.teacher_average and trained_width < 4:
        teacher += trained * 4  # a moving average kept in bfloat16 would never move
    if spec.teacher_model is not None:
        teacher = Sizes.of(spec.teacher_model).parameters * width
    at_once = min(workload.episodes, spec.max_sessions)
    together = workload.episodes * workload.trajectory_tokens // workload.minibatches
    recomputed, budget = spec.gradient_checkpointing, spec.micro_batch_tokens
    if budget == "auto":
        left = free - own - sizes.parameters * width - trained * 12 - masters - teacher - (trained * 4 if lora else 0)
        fit = tokens_that_fit(left, sizes, width, lora=bool(lora), recomputed=recomputed)
        budget = fit if gpu else ON_CPU
    batch = max(min(budget, together), workload.trajectory_tokens)
    sampled_share = min(1.0, workload.turns * workload.turn_tokens / workload.trajectory_tokens)
    rows = round(batch * sampled_share)
    wanted = workload.want
    if wanted != "whole":
        rows = min(rows, max(1, most_logits(gpu, wanted == "chosen") // sizes.vocabulary))  # computed in chunks
    logits = rows * sizes.vocabulary
    native = width if width < 4 else 0  # bytes of a logit in the model's dtype, if not float32
    to_score, to_learn = SCORE[wanted] + native, LEARN[wanted] + native
    if gpu and wanted == "chosen":  # the logits, and their gradient
        to_score, to_learn = width, 2 * width
    layer = one_layer(sizes)
    kept = kept_per_token(sizes, width, lora=bool(lora), recomputed=recomputed)
    prefill = min(at_once * workload.trajectory_tokens, max(PREFILL_BATCH_TOKENS, workload.trajectory_tokens))
    phases: dict[str, dict[str, int]] = {
        SAMPLING: {
            f"keys and values of {at_once} episodes of {workload.trajectory_tokens:,} tokens": round(
                POOL * at_once * workload.trajectory_tokens * sizes.cache * width
            ),
            "logits": at_once * sizes.vocabulary * (width + CHOOSE),
            "activations of one layer": prefill * layer * width,
        },
        SCORING: {
            f"logits of {rows:,} sampled tokens": logits * to_score,
            "activations of one layer": batch * layer * width,
        },
        UPDATE: {
            f"gradients of {trained / 1e6:,.1f} M parameters": trained * 4,
            f"activations of {batch:,} tokens": batch * kept,
            f"logits of {rows:,} sampled tokens": logits * to_learn,
        },
    }
    if lora:
        if not gpu:
            phases[UPDATE]["heap fragmentation between activations"] = round(HOLES * batch * kept)
        passing = 12 * sizes.adapted_out  # its output, that scaled, and the sum: temporary float32
        for phase, tokens in ((SAMPLING, prefill), (SCORING, batch), (UPDATE, batch)):
            phases[phase]["an adapter's intermediate results"] = tokens * passing
            if sizes.rebuilt:
                at_a_time = 1 if phase == UPDATE and not spec.gradient_checkpointing else sizes.layers
                phases[phase]["experts with their adapters"] = sizes.rebuilt * width // at_a_time
    if wanted == "whole" and not gpu:  # a run on a GPU keeps them in CPU memory
        whole = round(workload.episodes * workload.trajectory_tokens * sampled_share) * sizes.vocabulary * 4
        for phase in (SCORING, UPDATE):
            phases[phase]["the teacher's distributions of all episodes"] = whole
    if spec.teacher == "none":
        del phases[SCORING]
    stays = {
        "the program itself": own,
        f"weights ({sizes.parameters / 1e6:,.1f} M, {spec.dtype})": sizes.parameters * width,
        "adapter": trained * 4 if lora else 0,
        "master weights in float32": masters,
        "AdamW's two moments": trained * 8,
        "the teacher's own weights": teacher,
    }
    seconds = _seconds(spec, workload, sizes, speed, batch) if speed else {}
    note = ""
    if sizes.unknown:
        note = (
            f"{sizes.unknown / 1e6:,.0f} M of the model's weights are of an unknown kind (other experts?). They count "
            "as weights; the estimates of activations and seconds are too low"
        )
    return Estimate({name: size for name, size in stays.items() if size}, phases, seconds, note)


def _seconds(spec: EngineSpec, workload: Workload, sizes: Sizes, speed: Speed, batch: int) -> dict[str, float]:
    episodes, most = workload.episodes, workload.trajectory_tokens
    at_once = min(episodes, spec.max_sessions)
    sampled = min(workload.turns * workload.turn_tokens, most)
    attention = sizes.layers * 2 * sizes.queries * most  # scores and weighted sums, over half of the tokens on average
    token, word = 2 * sizes.matrices + attention, 2 * sizes.head
    passes = -(-episodes // at_once) * sampled  # decoding steps, each for all episodes at once
    calls = sizes.layers * CALLS * speed.call
    trained = episodes * (most * token + sampled * word)
    micro_batches = -(-episodes * most // batch)
    # Forward, gradients of activations, and (without LoRA) of weights; checkpointing repeats the forward pass.
    times = (2 if spec.lora else 3) + spec.gradient_checkpointing
    return {
        SAMPLING: passes * calls
        + episodes * min(workload.turns, sampled) * TURN * speed.call
        + episodes * (sampled * (token + word) / speed.few + (most - sampled) * token / speed.many),
        **({} if spec.teacher == "none" else {SCORING: trained / speed.many + micro_batches * calls}),
        UPDATE: workload.epochs * (times * trained / speed.many + 3 * micro_batches * calls),
    }


def measure(device: Any, dtype: str, *, rows: int, hidden: int) -> Speed:
    """Measure the device's speed. Takes about a second."""

    def product(count: int, inner: int, outer: int) -> Callable[[], object]:
        left = torch.randn(count, inner, device=device).to(DTYPES[dtype])
        right = torch.randn(inner, outer, device=device).to(DTYPES[dtype])
        return lambda: left @ right

    def speed(count: int, inner: int, outer: int) -> float:
        # A CPU without bfloat16 takes seconds for what a GPU does in microseconds, so begin small.
        little = _fastest(product(8, inner, outer), device)
        if count * little > 8 * 0.5:
            return 2 * 8 * inner * outer / little
        return 2 * count * inner * outer / _fastest(product(count, inner, outer), device)

    inner = max(64, min(hidden, 2048))
    return Speed(
        many=speed(1024, inner, inner),
        few=speed(rows, inner, 4 * inner),
        call=_fastest(product(1, 8, 8), device),
    )


def _fastest(work: Callable[[], object], device: Any) -> float:
    """Seconds of one call of `work`: the minimum over several runs, which other load on the machine affects least."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds(calls: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        return time.perf_counter() - begin

    spent = best = seconds(1)
    while spent < 0.25:
        took = seconds(5)
        best, spent = min(best, took / 5), spent + took
    return best
