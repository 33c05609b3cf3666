"""`skillsd doctor`: versions and devices, and whether a recipe fits on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from skillsd.config import LoraSection, RunConfig
from skillsd.engines.estimate import Estimate
from skillsd.envs import registry
from skillsd.report.manifest import PACKAGES, processor, versions
from skillsd.report.progress import duration
from skillsd.runs.build import load_task_set
from skillsd.runs.checks import engine_spec, workload

EXTRAS = {
    "peft": "LoRA (pip install peft)",
    "openai": "skills.summariser=openai, skillsd eval --endpoint (pip install openai)",
    "gguf": "the model smollm2-135m (pip install gguf)",
    "wandb": "Weights & Biases (pip install wandb)",
    "tinker": "engine.name=tinker (pip install tinker; docs/tinker.md)",
}

FILL = 0.9
"""Share of the free memory to plan with: fragmentation and some kernels are not modelled."""

MONTH = 30 * 86400.0


def examine(console: Console, config: RunConfig | None) -> None:
    """Print versions and devices, and for a recipe an estimate of memory and time."""
    import torch

    def line(name: str, text: str) -> None:
        console.print(f"{name:14} {text}", highlight=False, soft_wrap=True)

    found = versions()
    for name in ("python", *PACKAGES):
        if name not in EXTRAS:
            line(name, found[name] or "not installed")
    for package, use in EXTRAS.items():
        state = "installed" if importlib.util.find_spec(package) else "not installed"
        line(package, f"{found.get(package) or state}: {use}")
    for name, lines in registry.doctor_reports().items():
        for text in lines:
            line(name, text)
    line("processor", f"{processor()}, {os.cpu_count()} cores")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        line("GPU", f"{torch.cuda.get_device_name()}, {free >> 20} of {total >> 20} MiB free")
    else:
        line("GPU", "none: training runs on the CPU")
        line("memory", f"{_available_memory() >> 20} MiB free")
    line("disk", f"{shutil.disk_usage('.').free >> 30} GiB free here")
    if config is not None:
        _examine_recipe(console, config)


def _examine_recipe(console: Console, config: RunConfig) -> None:
    """Print memory and time by phase, and what to change if the recipe does not fit."""
    task_set = load_task_set(config)
    registry.tasks_of(task_set, config.evaluation.split, "evaluation.split")
    spec = engine_spec(config)
    config.engine.check(spec)
    iterations = config.training.iterations
    estimator = config.engine.estimator(spec, workload(config, task_set.max_turns))
    if estimator is None:
        _show_usage(console, config, config.engine.usage(spec, workload(config, task_set.max_turns), iterations))
        return

    def expected(other: RunConfig) -> Estimate:
        return estimator(engine_spec(other), workload(other, task_set.max_turns))

    found, free = expected(config), estimator.free
    console.print(
        f"\nrecipe {config.name} on {estimator.device}: {config.episodes_per_iteration} episodes per iteration, "
        f"{config.training.iterations} iterations. Estimate if every episode uses its whole token budget:",
        highlight=False,
    )
    _show_parts(console, "throughout", found.stays)
    for phase, parts in found.phases.items():
        _show_parts(console, f"in addition, during {phase}", parts)
    if found.note:
        console.print(f"  note: {found.note}", highlight=False)
    fits = found.need <= FILL * free
    verdict = "fits" if fits else "does NOT fit"
    console.print(f"  {'peak':60} {_mib(found.need)}: {verdict} ({_mib(free).strip()} are free)", highlight=False)
    if not fits:
        changes, need = remedies(config, FILL * free, lambda other: expected(other).need)
        for text, after in changes:
            console.print(f"  {'change ' + text:60} {_mib(after)}", highlight=False)
        if need > FILL * free:
            console.print(
                "  Still does not fit: lower rollout.trajectory_tokens, or use a smaller model or a larger device",
                highlight=False,
            )
    if found.seconds:
        times = ", ".join(f"{phase} {_time(seconds)}" for phase, seconds in found.seconds.items())
        whole = sum(found.seconds.values())
        console.print(f"  time per iteration, about: {_time(whole)} ({times})", highlight=False)
        run = whole * config.training.iterations
        hint = ". Too slow here: use a smaller model or a faster device" if run > MONTH else ""
        console.print(f"  time of the run, about: {duration(run)}, on an idle machine, without evaluations{hint}")


def _show_usage(console: Console, config: RunConfig, usage: list[str]) -> None:
    """What a run uses of its engine's server."""
    if not usage:
        console.print(f"\nrecipe {config.name}: no estimate for the engine {config.engine.name!r}", highlight=False)
        return
    console.print(
        f"\nrecipe {config.name} with the engine {config.engine.name!r}: {config.episodes_per_iteration} episodes per "
        f"iteration, {config.training.iterations} iterations. Each iteration, if every episode uses its whole token "
        "budget:",
        highlight=False,
    )
    for line in usage:
        console.print(f"  {line}", highlight=False)


def remedies(config: RunConfig, free: float, need: Callable[[RunConfig], int]) -> tuple[list[tuple[str, int]], int]:
    """Settings that reduce the memory need until it fits, or nothing helps any more. Greedy: the largest saving first.

    Returns:
        Each setting as ``key=value``, with the bytes needed after it; and the bytes needed after all of them.
    """
    taken: list[tuple[str, int]] = []
    now = need(config)
    while now > free:
        tries = [(need(changed), text, changed) for text, changed in _changes(config)]
        best, text, changed = min(tries, key=lambda t: t[0], default=(now, "", config))
        if best > 0.97 * now:
            break
        key = text.partition("=")[0]
        taken = [
            (other, size) for other, size in taken if not other.startswith(f"{key}=")
        ]  # halved again: list it once
        taken.append((text, best))
        config, now = changed, best
    return taken, now


def _changes(config: RunConfig) -> list[tuple[str, RunConfig]]:
    model, rollout, training = config.model, config.rollout, config.training
    wanted: list[tuple[str, str, Any, str]] = []
    if config.model.lora is None and config.model.adapter is None:
        wanted.append(("model", "lora", LoraSection(), "{}"))
    if model.dtype == "float32":
        wanted.append(("model", "dtype", "bfloat16", "bfloat16"))
    if not model.gradient_checkpointing:
        wanted.append(("model", "gradient_checkpointing", True, "true"))
    if training.micro_batch_tokens != "auto" and training.micro_batch_tokens > rollout.trajectory_tokens:
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


def _show_parts(console: Console, title: str, parts: Mapping[str, int]) -> None:
    console.print(f"  {title}", highlight=False)
    for name, size in parts.items():
        console.print(f"    {name:58} {_mib(size)}", highlight=False)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else duration(seconds)


def _mib(size: float) -> str:
    return f"{size / (1 << 20):10,.0f} MiB"


def _available_memory() -> int:
    """Bytes available without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
