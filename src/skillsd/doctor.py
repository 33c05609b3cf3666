"""`skillsd doctor`: what is here, and whether a recipe would fit."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from skillsd.config import RunConfig
from skillsd.methods import method
from skillsd.report.manifest import processor, versions

EXTRAS = {
    "peft": "LoRA (skillsd[lora])",
    "gguf": "smollm2-135m (skillsd[smollm2])",
    "wandb": "Weights & Biases (skillsd[wandb])",
}
BYTES = {"float32": 4, "bfloat16": 2}


def examine(console: Console, config: RunConfig | None) -> None:
    """Print what is installed, the device, and for a recipe an estimate of the memory that training takes."""
    import torch

    for name, found in versions().items():
        console.print(f"{name:14} {found or 'not installed'}", highlight=False)
    for package, what in EXTRAS.items():
        state = "installed" if importlib.util.find_spec(package) else "not installed"
        console.print(f"{package:14} {state}: {what}", highlight=False)
    console.print(f"{'processor':14} {processor()}, {os.cpu_count()} cores", highlight=False)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        console.print(f"{'GPU':14} {name}, {free >> 20} of {total >> 20} MiB free", highlight=False)
    else:
        free = _free_memory()
        console.print(f"{'GPU':14} none: training runs on the CPU", highlight=False)
        console.print(f"{'memory':14} {free >> 20} MiB free", highlight=False)
    console.print(f"{'disk':14} {shutil.disk_usage('.').free >> 30} GiB free here", highlight=False)
    if config is not None:
        _examine_recipe(console, config, free)


def _examine_recipe(console: Console, config: RunConfig, free: int) -> None:
    """Weights, gradients, optimiser and caches, from the model's own sizes; no weights are loaded."""
    import torch

    from skillsd.envs import registry

    task_set = registry.load(config.environment.name, config.environment.options)
    task_set.tasks(config.evaluation.split)
    architecture, model = _skeleton(config.model.name)
    parameters = sum(p.numel() for p in model.parameters())
    width = BYTES[config.model.dtype]
    trained = parameters
    if config.model.lora:
        matrices = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features < 100_000]
        trained = sum(config.model.lora.rank * (m.in_features + m.out_features) for m in matrices)
    # Gradient in the weights' format; AdamW's two moments and, below float32, the master copy in float32.
    learning = trained * (width + 8 + (4 if width < 4 and not config.model.lora else 0))
    heads = getattr(architecture, "num_key_value_heads", architecture.num_attention_heads)
    head = getattr(architecture, "head_dim", None) or architecture.hidden_size // architecture.num_attention_heads
    per_token = 2 * architecture.num_hidden_layers * heads * head * width
    episodes = config.rollout.tasks_per_iteration * config.rollout.group_size
    cache = min(episodes, config.rollout.concurrency) * config.rollout.trajectory_tokens * per_token
    # Some 16 activations of the hidden size a layer are kept for the backward pass. Logits stand as the model's, in
    # float32, divided by the temperature and normalised; should every token be a sampled one, four rows each.
    tokens = max(config.training.micro_batch_tokens, config.rollout.trajectory_tokens)
    layers = 1 if config.model.gradient_checkpointing else architecture.num_hidden_layers
    activations = tokens * 16 * architecture.hidden_size * width * layers + tokens * architecture.vocab_size * 16
    row = method(config.method)
    lags = row.teacher == "synchronised" and (config.teacher.sync_every > 1 or config.teacher.ema is not None)
    snapshot = trained * width if row.teacher == "frozen" or lags else 0
    if lags and config.teacher.ema is not None and width < 4:
        snapshot += trained * 4  # a moving average in bfloat16 would never move
    if row.teacher == "external" and config.teacher.model is not None:
        snapshot = sum(p.numel() for p in _skeleton(config.teacher.model)[1].parameters()) * width
    parts = {
        f"weights ({parameters / 1e6:.1f} M)": parameters * width,
        f"gradient and optimiser ({trained / 1e6:.1f} M trained)": learning,
        "the teacher's own weights": snapshot,
        f"keys and values of {min(episodes, config.rollout.concurrency)} episodes": cache,
        "activations (rough)": activations,
    }
    console.print(f"\nrecipe {config.name}: {episodes} episodes an iteration", highlight=False)
    for name, size in parts.items():
        console.print(f"  {name:44} {size / (1 << 20):10,.0f} MiB", highlight=False)
    # Keys and values are needed while sampling, gradients and activations while updating.
    need = parameters * width + learning + snapshot + max(cache, activations)
    verdict = "fits" if need < 0.9 * free else "does NOT fit"
    console.print(f"  {'at once, at most':44} {need / (1 << 20):10,.0f} MiB: {verdict}", highlight=False)
    if need >= 0.9 * free:
        console.print(
            "  try: model.lora={rank: 16}, model.dtype=bfloat16, model.gradient_checkpointing=true, a smaller "
            "training.micro_batch_tokens or rollout.concurrency"
        )


def _skeleton(name: str) -> tuple[Any, Any]:
    """A model's configuration, and the model without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from skillsd.engines.torch.models import resolve
    from skillsd.errors import UserError

    path = resolve(name)
    if path.startswith((".", "/", "~")) and not (Path(path).expanduser() / "config.json").is_file():
        raise UserError(f"no model in {path!r}: expected a folder with config.json, weights and a tokenizer")
    try:
        architecture = AutoConfig.from_pretrained(Path(path).expanduser() if path.startswith("~") else path)
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the model {name!r}: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        return architecture, AutoModelForCausalLM.from_config(architecture)


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
