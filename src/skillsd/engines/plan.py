"""A run on N GPUs on paper: memory of a rank and of a replica, room for keys and values, and seconds by phase.

Nothing here is measured on several GPUs. What share of a GPU's speed is reached was measured on one (docs/gpu.md); the
rest are assumptions, which `assumptions` puts into words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from skillsd.engines.spec import EngineSpec

UPDATE_SHARE, SCORING_SHARE, DECODE_SHARE = 0.47, 0.49, 0.70
"""Shares of the peak arithmetic in the update and in scoring, and of the memory bandwidth in decoding (docs/gpu.md)."""
IDEAL_SHARE = 0.60
"""Share of the peak arithmetic that the best training code reaches."""
STEP_SECONDS = 0.003
"""The shortest decode step of a small model (docs/gpu.md)."""
USABLE = 0.88
"""Share of a GPU's memory that vLLM can use for weights, keys and values."""
TAIL = 0.25
"""Further time of a rollout phase while the last, longest episodes leave the GPUs half idle."""
LINK = 50e9
"""Bytes per second between two GPUs, as PCIe 5 has; NVLink has several times that."""
MASTER, MOMENTS, GRADIENT = 4, 8, 4
"""Bytes per trained parameter."""


class ModelSizes(Protocol):
    """What a plan needs of `skillsd.engines.torch.sizes.Sizes`."""

    @property
    def parameters(self) -> int: ...
    @property
    def matrices(self) -> int: ...
    @property
    def head(self) -> int: ...
    @property
    def cache(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def queries(self) -> int: ...
    @property
    def adapter(self) -> int: ...


@dataclass(frozen=True)
class Gpus:
    """The GPUs of one kind that a run gets.

    Attributes:
        count: how many.
        memory: bytes of each.
        bandwidth: of its memory, bytes per second.
        flops: dense operations per second in the model's dtype.
    """

    count: int
    memory: float
    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Episodes:
    """The work of an iteration, if every episode uses its whole token budget.

    Attributes:
        count: in all groups.
        tokens: of each, prompt and observations included.
        sampled: of these, by the student.
        rescored: whether the learner scores the sampled tokens once more (``objective.importance_cap``).
        epochs: updates on each.
    """

    count: int
    tokens: int
    sampled: int
    rescored: bool = False
    epochs: int = 1


@dataclass(frozen=True)
class Plan:
    """The result.

    Attributes:
        ranks: memory of a training rank, in bytes, without activations, by what is divided among the ranks: ``none``;
            ``state``, the optimiser's; ``layers``, everything.
        replica_weights: bytes of the weights in a replica of the sampler.
        room: tokens whose keys and values fit beside them.
        wanted: tokens whose keys and values are wanted on a GPU at the end of all episodes; on average half of them.
        waves: how many times the wanted tokens exceed the room, on average over the episodes; at least 1.
        seconds: of an iteration by phase.
        ideal: seconds of an iteration without tail and rescoring, at full bandwidth and `IDEAL_SHARE`.
        cache_share: of the bytes read in decoding, the share that are keys and values.
    """

    ranks: Mapping[str, float]
    replica_weights: float
    room: float
    wanted: float
    waves: float
    seconds: Mapping[str, float]
    ideal: float
    cache_share: float


def plan(sizes: ModelSizes, spec: EngineSpec, episodes: Episodes, gpus: Gpus) -> Plan:
    """The plan of a run with a training rank and a replica of the sampler on each GPU, which work in turn."""
    width = {"float32": 4, "bfloat16": 2}[spec.dtype]
    weights, cache = sizes.parameters * width, sizes.cache * width
    trained = sizes.adapter * spec.lora.rank if spec.lora else sizes.parameters
    copies = (spec.teacher == "external") * weights + (spec.teacher == "snapshot") * trained * width
    held, state = weights + copies + trained * GRADIENT, trained * (MASTER + MOMENTS)
    ranks = {
        "none": float(held + state),
        "state": held + (state + trained * GRADIENT) / gpus.count,  # the sum over the ranks, of its slice
        "layers": (held + state) / gpus.count,
    }
    each = episodes.count / gpus.count
    room = (gpus.memory * USABLE - weights) / cache
    wanted = each * episodes.tokens
    waves = max(1.0, wanted / 2 / room) if room > 0 else float("inf")

    read = episodes.sampled * each * episodes.tokens / 2 * cache
    steps = episodes.sampled * waves
    decode = (read + steps * weights) / gpus.bandwidth
    token = 2 * sizes.matrices + 2 * sizes.layers * sizes.queries * episodes.tokens  # attention to half of the tokens
    forward = episodes.count * (episodes.tokens * token + episodes.sampled * 2 * sizes.head) / (gpus.count * gpus.flops)
    prefill = each * (episodes.tokens - episodes.sampled) * token / gpus.flops
    backward = 1 if spec.lora else 2
    passes = 0 if spec.teacher == "none" else 1
    rollout = max(decode / DECODE_SHARE, steps * STEP_SECONDS) + prefill / SCORING_SHARE
    exchanged = 2 * trained * GRADIENT * (gpus.count - 1) / gpus.count  # sum of gradients; each rank sends and receives
    seconds = {
        "rollout": rollout * (1 + TAIL),
        "teacher": passes * forward / SCORING_SHARE,
        "rescoring": episodes.rescored * forward / SCORING_SHARE,
        "update": episodes.epochs * forward * (1 + backward + spec.gradient_checkpointing) / UPDATE_SHARE,
        "exchange": (exchanged + weights * (gpus.count > 1)) / LINK,
    }
    ideal = decode + (prefill + forward * (passes + episodes.epochs * (1 + backward))) / IDEAL_SHARE
    share = read / (read + steps * weights) if read else 0.0
    return Plan(ranks, weights, room, wanted, waves, {k: s for k, s in seconds.items() if s}, ideal, share)


def assumptions() -> list[str]:
    """What the figures rest on, a line each."""
    return [
        f"{UPDATE_SHARE:.0%} of the peak arithmetic in the update, {SCORING_SHARE:.0%} in scoring and prefill, "
        f"{DECODE_SHARE:.0%} of the bandwidth in decoding: measured on one H200 (docs/gpu.md)",
        f"ranks exchange {LINK / 1e9:g} GB/s; vLLM uses {USABLE:.0%} of a GPU's memory while the learner's is free; a "
        f"rollout phase takes {TAIL:.0%} longer for its last episodes: not measured",
        "every episode uses all of its tokens; environments, summaries and handing the weights to vLLM take no time",
        f"ideal: full bandwidth, {IDEAL_SHARE:.0%} of the peak arithmetic, no tail, no rescoring, no exchange",
    ]
