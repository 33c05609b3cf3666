"""`skillsd doctor`: what is here, and whether a recipe would fit."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from skillsd.config import RunConfig
from skillsd.estimate import FILL, Estimate, Sizes, estimate, lora_of, measure, remedies
from skillsd.report.manifest import processor, versions
from skillsd.report.progress import duration

EXTRAS = {
    "peft": "LoRA (skillsd[lora])",
    "openai": "endpoints: summaries, skillsd eval (skillsd[openai])",
    "gguf": "smollm2-135m (skillsd[smollm2])",
    "wandb": "Weights & Biases (skillsd[wandb])",
}
CUDA = 600 << 20
"""Bytes that CUDA and its libraries take on a device."""


def examine(console: Console, config: RunConfig | None) -> None:
    """Print what is installed, the device, and for a recipe an estimate of the memory and time that training takes."""
    import torch

    for name, found in versions().items():
        console.print(f"{name:14} {found or 'not installed'}", highlight=False)
    for package, what in EXTRAS.items():
        state = "installed" if importlib.util.find_spec(package) else "not installed"
        console.print(f"{package:14} {state}: {what}", highlight=False)
    for line in _appworld():
        console.print(f"{'appworld':14} {line}", highlight=False, soft_wrap=True)
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


def _appworld() -> list[str]:
    """What of AppWorld is here: its engine, the tasks that we build, the official ones; and what its code may do."""
    from skillsd.envs.appworld import client, paths

    engine = "installed" if paths.installed() else f"not installed ({paths.SETUP})"
    own = "built" if paths.built_by(paths.world_folder()) == paths.builder_version() else "not built"
    lines = [f"{engine}; our own tasks {own}; official data: {paths.official() or 'not found ($APPWORLD_ROOT)'}"]
    if paths.installed():
        held = client.protections(paths.python())
        lines.append(f"what holds of the jail for the model's code: {', '.join(held) or 'nothing'} (docs/appworld.md)")
        lines += [f"OPEN: {name} (would be: {words})" for name, words in client.PROTECTIONS.items() if name not in held]
    return lines


def _examine_recipe(console: Console, config: RunConfig, free: int) -> None:
    """Memory by phase, seconds by phase, and what to change if it does not fit."""
    import torch

    from skillsd.engines.torch.models import pick_device
    from skillsd.envs import registry

    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    device = pick_device(config.model.device)
    if device.type == "cuda":
        (free, total), own = torch.cuda.mem_get_info(device), CUDA
    else:
        free, own, total = _free_memory() + _resident(), _resident(), 0
    task_set = registry.load(config.environment.name, config.environment.options)
    task_set.tasks(config.evaluation.split)
    lora = lora_of(config)
    sizes = Sizes.of(config.model.name, lora.target_modules if lora else "all-linear")
    at_once = min(config.episodes_per_iteration, config.rollout.concurrency)
    speed = measure(device, config.model.dtype, rows=at_once, hidden=sizes.hidden)

    def expected(other: RunConfig) -> Estimate:
        return estimate(other, sizes, turns=task_set.max_turns, speed=speed, own=own, total=total)

    found = expected(config)
    console.print(
        f"\nrecipe {config.name} on {device}: {config.episodes_per_iteration} episodes an iteration, "
        f"{config.training.iterations} iterations; at most, were every budget of tokens used up",
        highlight=False,
    )
    _show_parts(console, "all the time", found.stays)
    for phase, parts in found.phases.items():
        _show_parts(console, f"besides, in {phase}", parts)
    if sizes.unknown:
        console.print(
            f"  note: it is not known how {sizes.unknown / 1e6:,.0f} M of the model's weights are used (experts of an "
            "unknown kind?). They count as weights; activations and seconds come out too low",
            highlight=False,
        )
    fits = found.need <= FILL * free
    verdict = "fits" if fits else "does NOT fit"
    console.print(
        f"  {'at once, at most':60} {_mib(found.need)}: {verdict} ({_mib(free).strip()} are free)", highlight=False
    )
    if not fits:
        changes, need = remedies(config, FILL * free, lambda other: expected(other).need)
        for text, after in changes:
            console.print(f"  {'change ' + text:60} {_mib(after)}", highlight=False)
        if need > FILL * free:
            console.print(
                "  Even so it does not fit: shorten rollout.trajectory_tokens, take a smaller model or a larger device",
                highlight=False,
            )
    times = ", ".join(f"{phase} {_time(seconds)}" for phase, seconds in found.seconds.items())
    whole = sum(found.seconds.values())
    console.print(f"  an iteration, at most: {_time(whole)} ({times})", highlight=False)
    console.print(f"  the run, at most: {duration(whole * config.training.iterations)}; without its evaluations")


def _show_parts(console: Console, title: str, parts: Mapping[str, int]) -> None:
    console.print(f"  {title}", highlight=False)
    for name, size in parts.items():
        console.print(f"    {name:58} {_mib(size)}", highlight=False)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else duration(seconds)


def _mib(size: float) -> str:
    return f"{size / (1 << 20):10,.0f} MiB"


def _resident() -> int:
    """Bytes of this process, which has loaded all that a run loads but the model."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 400 << 20


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
