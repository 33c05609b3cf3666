"""What a recipe will take, before it is started: memory by phase, and seconds an iteration. No weights are loaded.

Upper ends: every episode uses its whole budget of tokens. What is not modelled (a kind of attention that builds its
whole matrix, fragmentation) is why `FILL` of the memory counts as full.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillsd.config import LoraSection, RunConfig
from skillsd.errors import UserError
from skillsd.methods import method

FILL = 0.9
"""The share of the free memory that may be planned with."""

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-4B-Instruct-2507": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 262144,
    }
}
"""Sizes of hub models that the package's recipes name: they can be estimated where no hub can be reached."""

WIDTH = {"float32": 4, "bfloat16": 2}
KEPT = 1.4
"""Numbers kept for the backward pass, for each that goes into or comes out of a matrix: norms, rotations and gates."""
CALLS = 60
"""Operations of one layer in one forward pass, for what each costs beside its arithmetic."""
POOL = 1.25
"""The sampler's pool of keys and values grows by at least a quarter at a time, so this is the most that it takes."""
HOLES = 1.0
"""On a CPU, what glibc's heap keeps beside each activation under LoRA: adapters' passing results leave holes between
those that are kept. Measured with one model (docs/doctor.md); a GPU's allocator is another."""
CHOOSE = 20
"""Bytes a logit while a token is sampled, beside the model's own: float32 log-probs and two float64 (`choose`)."""
SCORE = {"chosen": 8, "top_k": 20, "whole": 12}
"""Bytes a logit while it is scored, by what is wanted of it: float32 logits, log-probs, and what is made of them."""
LEARN = {"chosen": 12, "top_k": 24, "whole": 36}
"""The same with gradients; of whole distributions the teacher's, too."""


@dataclass(frozen=True)
class Sizes:
    """A model's figures.

    Attributes:
        parameters: of all weights; tied ones once.
        matrices: parameters that a token is multiplied with, those of the output head apart; of experts only as many
            as it is sent to.
        head: parameters of the output head.
        flow: numbers that go into or come out of such a matrix, per token, in all layers.
        cache: numbers of keys and values per token.
        adapter: trainable parameters per unit of LoRA's rank.
        adapted_in: numbers that go into a matrix with an adapter, per token, in all layers.
        adapted_out: the most that come out of one.
        rebuilt: weights of experts that have adapters: peft adds those up anew in each pass.
        unknown: parameters of the language model of which it is not known how they are used.
    """

    parameters: int
    matrices: int
    head: int
    flow: int
    cache: int
    layers: int
    hidden: int
    vocabulary: int
    adapter: int
    adapted_in: int
    adapted_out: int
    rebuilt: int
    unknown: int

    @classmethod
    def of(cls, name: str, targets: str | list[str] = "all-linear") -> Sizes:
        """Of the model `name`, from its config.json alone."""
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        architecture = read_architecture(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture)
        # Of a model that sees or hears as well, what reads and writes: the rest takes memory, but no tokens.
        text, decoder = architecture.get_text_config(), model.get_decoder()
        output, within = model.get_output_embeddings(), {id(module) for module in decoder.modules()}
        linear = {
            path: (*(module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]), id(module))
            for path, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not output
        }
        adapted = [shape for path, shape in linear.items() if _is_target(path, targets)]
        experts = [
            tuple(weight.shape)
            for module in decoder.modules()
            for weight in module.parameters(recurse=False)
            if weight.ndim == 3 and getattr(module, "num_experts", None) == len(weight)
        ]
        asked = getattr(text, "num_experts_per_tok", None) or 0
        own = [(a, b) for a, b, module in linear.values() if module in within]
        shapes = own + asked * [(a, b) for _, a, b in experts]
        known = sum(a * b for a, b in own) + bool(asked) * sum(n * a * b for n, a, b in experts)
        known += sum(module.weight.numel() for module in decoder.modules() if isinstance(module, torch.nn.Embedding))
        of_decoder = sum(weight.numel() for weight in decoder.parameters())
        adapter, rebuilt = sum(a + b for a, b, _ in adapted), 0
        parameters = sum(weight.numel() for weight in model.parameters())
        if experts and importlib.util.find_spec("peft"):
            adapter, rebuilt = _with_experts(model, targets)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            parameters=parameters,
            matrices=sum(a * b for a, b in shapes),
            head=text.vocab_size * text.hidden_size,
            flow=sum(a + b for a, b in shapes),
            cache=2 * text.num_hidden_layers * heads * width,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            vocabulary=text.vocab_size,
            adapter=adapter,
            adapted_in=sum(a for a, _, module in adapted if module in within),
            adapted_out=max((b for _, b, module in adapted if module in within), default=0),
            rebuilt=rebuilt,
            unknown=of_decoder - known if of_decoder - known > 0.05 * of_decoder else 0,
        )


def _with_experts(model: Any, targets: str | list[str]) -> tuple[int, int]:
    """Trainable parameters of adapters of rank 1, and the weights of experts that get one: asked of peft itself.

    Which experts it adapts depends on its version and on the kind of model.
    """
    import torch

    from skillsd.engines.torch.models import LoraOptions, add_lora

    with torch.device("meta"):
        wrapped = add_lora(model, LoraOptions(rank=1, alpha=1, target_modules=targets))
    trained = sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)
    bare: list[Any] = [module for module in wrapped.modules() if hasattr(module, "parameter_name")]
    return trained, sum(module.get_param().numel() for module in bare)


def _is_target(path: str, targets: str | list[str]) -> bool:
    """As peft understands it: a list names modules by their ends, a string is a pattern of whole paths."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def read_architecture(name: str) -> Any:
    """A model's configuration: a folder's, a shipped model's, a hub's; of `PUBLISHED` ones without asking the hub.

    Raises:
        UserError: if it can't be had.
    """
    from transformers import AutoConfig

    from skillsd.engines.torch.models import local_folder, resolve

    if name in PUBLISHED:
        return AutoConfig.for_model(**PUBLISHED[name])
    folder = local_folder(resolve(name))
    try:
        return AutoConfig.from_pretrained(folder or name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"can't read the model {name!r}: {str(error).splitlines()[0]} To estimate without it: model.name=FOLDER, a "
            "folder that holds its config.json (no weights needed)"
        ) from error


def lora_of(config: RunConfig) -> LoraSection | None:
    """The adapter's form: the recipe's, or that of the adapter which is trained on."""
    folder = config.model.adapter
    if folder is None:
        return config.model.lora
    try:
        form = json.loads((Path(folder).expanduser() / "adapter_config.json").read_text(encoding="utf-8"))
        return LoraSection(rank=form["r"], alpha=form["lora_alpha"], target_modules=form["target_modules"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no adapter in {folder!r} (model.adapter): expected a folder with adapter_config.json, as peft writes it"
        ) from error


@dataclass(frozen=True)
class Estimate:
    """Bytes, and seconds if the device's speed was given.

    Attributes:
        stays: what is there all the time, by name.
        phases: what comes on top in each phase of an iteration, by name.
        seconds: of each phase of an iteration.
    """

    stays: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    seconds: Mapping[str, float]

    @property
    def need(self) -> int:
        """The most at once."""
        return sum(self.stays.values()) + max(sum(parts.values()) for parts in self.phases.values())


@dataclass(frozen=True)
class Speed:
    """What a device does in a second.

    Attributes:
        many, few: floating-point operations, for matrices with many rows (training) and with as many as episodes.
        call: seconds of an operation that computes next to nothing.
    """

    many: float
    few: float
    call: float


def estimate(
    config: RunConfig, sizes: Sizes, *, turns: int, speed: Speed | None = None, own: int = 0, total: int = 0
) -> Estimate:
    """What `config` takes with a model of these sizes.

    Args:
        turns: the most turns of an episode.
        own: bytes of the process before there is any model.
        total: bytes of the GPU, of which vLLM takes its share for good; 0 on a CPU.
    """
    from skillsd.engines.torch.halves import LOGITS
    from skillsd.engines.torch.sampler import PREFILL
    from skillsd.objective import ESTIMATORS

    model, rollout, row = config.model, config.rollout, method(config.method)
    width = WIDTH[model.dtype]
    lora = lora_of(config)
    if lora:
        trained, trained_width = lora.rank * sizes.adapter, 4  # peft keeps adapters in float32
    else:
        trained, trained_width = sizes.parameters, width
    masters = 0 if trained_width == 4 else trained * 4  # `MasterAdamW`: gradients are summed there, in float32
    lags = row.teacher == "synchronised" and (config.teacher.sync_every > 1 or config.teacher.ema is not None)
    teacher = trained * trained_width if row.teacher == "frozen" or lags else 0
    if lags and config.teacher.ema is not None and trained_width < 4:
        teacher += trained * 4  # a moving average in bfloat16 would never move
    if row.teacher == "external" and config.teacher.model is not None:
        teacher = Sizes.of(config.teacher.model).parameters * width
    episodes = config.episodes_per_iteration
    at_once = min(episodes, rollout.concurrency)
    together = episodes * rollout.trajectory_tokens // config.training.minibatches
    batch = max(min(config.training.micro_batch_tokens, together), rollout.trajectory_tokens)
    sampled_share = min(1.0, turns * rollout.turn_tokens / rollout.trajectory_tokens)
    rows = round(batch * sampled_share)
    exact = row.teacher != "none" and ESTIMATORS[config.objective.estimator].needs_distribution
    wanted = "chosen" if not exact else "whole" if config.objective.top_k is None else "top_k"
    if wanted != "whole":
        rows = min(rows, max(1, LOGITS // sizes.vocabulary))  # computed so many at a time
    logits = rows * sizes.vocabulary
    native = width if width < 4 else 0  # bytes of a logit as the model gives it, where that is another one
    one_layer = round(KEPT * sizes.flow / sizes.layers)
    kept = sizes.layers * one_layer * width  # bytes a token
    if lora and width < 4:
        kept += sizes.adapted_in * 4  # peft casts what goes into an adapter to the adapter's float32, and keeps that
    if model.gradient_checkpointing:
        kept = kept // sizes.layers + sizes.layers * sizes.hidden * width
    prefill = min(at_once * rollout.trajectory_tokens, max(PREFILL, rollout.trajectory_tokens))
    phases: dict[str, dict[str, int]] = {
        "sampling": {
            f"keys and values of {at_once} episodes of {rollout.trajectory_tokens:,} tokens": round(
                POOL * at_once * rollout.trajectory_tokens * sizes.cache * width
            ),
            "logits": at_once * sizes.vocabulary * (width + CHOOSE),
            "activations of one layer": prefill * one_layer * width,
        },
        "the teacher's scores": {
            f"logits of {rows:,} sampled tokens": logits * (SCORE[wanted] + native),
            "activations of one layer": batch * one_layer * width,
        },
        "update": {
            f"gradients of {trained / 1e6:,.1f} M parameters": trained * 4,
            f"activations of {batch:,} tokens": batch * kept,
            f"logits of {rows:,} sampled tokens": logits * (LEARN[wanted] + native),
        },
    }
    if lora:
        if not total:
            phases["update"]["holes in the heap between activations"] = round(HOLES * batch * kept)
        passing = 12 * sizes.adapted_out  # its output, scaled, and added to the matrix's: in float32, for a moment
        for phase, tokens in (("sampling", prefill), ("the teacher's scores", batch), ("update", batch)):
            phases[phase]["an adapter at work"] = tokens * passing
            if sizes.rebuilt:
                at_a_time = 1 if phase == "update" and not model.gradient_checkpointing else sizes.layers
                phases[phase]["experts with their adapters"] = sizes.rebuilt * width // at_a_time
    if wanted == "whole" and not total:  # on a GPU they wait in the other memory
        whole = round(episodes * rollout.trajectory_tokens * sampled_share) * sizes.vocabulary * 4
        for phase in ("the teacher's scores", "update"):
            phases[phase]["the teacher's distributions of all episodes"] = whole
    if row.teacher == "none":
        del phases["the teacher's scores"]
    stays = {
        "the program itself": own,
        f"weights ({sizes.parameters / 1e6:,.1f} M, {model.dtype})": sizes.parameters * width,
        "adapter": trained * 4 if lora else 0,
        "master weights in float32": masters,
        "AdamW's two moments": trained * 8,
        "the teacher's own weights": teacher,
    }
    if config.engine.name == "vllm":
        space = config.engine.cpu_kv_cache_gib << 30
        share = round(config.engine.gpu_memory_utilization * total)
        stays["vLLM, for good"] = share or sizes.parameters * width + space
        del phases["sampling"]
    seconds = _seconds(config, sizes, turns, speed, scored="the teacher's scores" in phases) if speed else {}
    return Estimate({name: size for name, size in stays.items() if size}, phases, seconds)


def _seconds(config: RunConfig, sizes: Sizes, turns: int, speed: Speed, *, scored: bool) -> dict[str, float]:
    rollout = config.rollout
    episodes, most = config.episodes_per_iteration, rollout.trajectory_tokens
    at_once = min(episodes, rollout.concurrency)
    sampled = min(turns * rollout.turn_tokens, most)
    attention = sizes.layers * 2 * sizes.hidden * most  # scores and sums over half of the others, on average
    token, word = 2 * sizes.matrices + attention, 2 * sizes.head
    passes = -(-episodes // at_once) * sampled  # decode steps, all episodes side by side
    calls = sizes.layers * CALLS * speed.call
    trained = episodes * (most * token + sampled * word)
    micro_batches = -(-episodes * most // max(config.training.micro_batch_tokens, most))
    # Forward, gradients of activations, and (without LoRA) of weights; checkpoints are computed again.
    times = (2 if lora_of(config) else 3) + config.model.gradient_checkpointing
    return {
        "sampling": passes * calls
        + episodes * (sampled * (token + word) / speed.few + (most - sampled) * token / speed.many),
        **({"the teacher's scores": trained / speed.many + micro_batches * calls} if scored else {}),
        "update": config.training.epochs * (times * trained / speed.many + 3 * micro_batches * calls),
    }


def measure(device: Any, dtype: str, *, rows: int, hidden: int) -> Speed:
    """The device's speed, in about a second."""
    import torch

    from skillsd.engines.torch.models import DTYPES

    def seconds(count: int, inner: int, outer: int) -> float:
        left = torch.randn(count, inner, device=device).to(DTYPES[dtype])
        right = torch.randn(inner, outer, device=device).to(DTYPES[dtype])
        return _fastest(lambda: left @ right, device)

    inner = max(64, min(hidden, 2048))
    return Speed(
        many=2 * 1024 * inner * inner / seconds(1024, inner, inner),
        few=2 * rows * inner * 4 * inner / seconds(rows, inner, 4 * inner),
        call=seconds(1, 8, 8),
    )


def _fastest(work: Callable[[], object], device: Any) -> float:
    """Seconds of one `work`: the best of several goes, so that others on the machine disturb least."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best, spent, goes = float("inf"), 0.0, 0
    while goes < 3 or spent < 0.25:
        wait()
        begin = time.perf_counter()
        for _ in range(5):
            work()
        wait()
        took = time.perf_counter() - begin
        best, spent, goes = min(best, took / 5), spent + took, goes + 1
    return best


def remedies(config: RunConfig, free: float, need: Callable[[RunConfig], int]) -> tuple[list[tuple[str, int]], int]:
    """Settings that make it fit, each as ``key=value`` with what is needed after it; and the need after all of them.

    The one that saves most is taken first, until it fits or nothing helps any more.
    """
    taken: list[tuple[str, int]] = []
    now = need(config)
    while now > free:
        tries = [(need(changed), text, changed) for text, changed in _changes(config)]
        best, text, changed = min(tries, key=lambda t: t[0], default=(now, "", config))
        if best > 0.97 * now:
            break
        key = text.partition("=")[0]
        taken = [(said, size) for said, size in taken if not said.startswith(f"{key}=")]  # halved again: said once
        taken.append((text, best))
        config, now = changed, best
    return taken, now


def _changes(config: RunConfig) -> list[tuple[str, RunConfig]]:
    model, rollout, training = config.model, config.rollout, config.training
    wanted: list[tuple[str, str, Any, str]] = []
    if lora_of(config) is None:
        wanted.append(("model", "lora", LoraSection(), "{}"))
    if model.dtype == "float32":
        wanted.append(("model", "dtype", "bfloat16", "bfloat16"))
    if not model.gradient_checkpointing:
        wanted.append(("model", "gradient_checkpointing", True, "true"))
    if training.micro_batch_tokens > rollout.trajectory_tokens:
        fewer = max(rollout.trajectory_tokens, training.micro_batch_tokens // 2)
        wanted.append(("training", "micro_batch_tokens", fewer, str(fewer)))
    if rollout.concurrency > 1:
        fewer = max(1, min(config.episodes_per_iteration, rollout.concurrency) // 2)
        wanted.append(("rollout", "concurrency", fewer, str(fewer)))
    found = []
    for section, key, value, text in wanted:
        part = getattr(config, section).model_copy(update={key: value})
        found.append((f"{section}.{key}={text}", config.model_copy(update={section: part})))
    return found
