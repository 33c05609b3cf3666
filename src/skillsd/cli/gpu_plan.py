"""`skillsd doctor RECIPE --gpus N`: the plan of a run on GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from skillsd.config import RunConfig
from skillsd.engines.plan import Episodes, Gpus, Plan, assumptions, plan
from skillsd.report.progress import duration
from skillsd.runs.build import load_task_set
from skillsd.runs.checks import engine_spec

DIVIDED = {
    "none": "a rank holds everything",
    "state": "the optimiser's state is divided among the ranks",
    "layers": "everything is divided among the ranks",
}


def show_plan(console: Console, config: RunConfig, gpus: Gpus) -> None:
    """Print memory, room for keys and values, and seconds by phase, with what they rest on.

    Raises:
        UserError: if the model's sizes can't be found out.
    """
    from skillsd.engines.torch.sizes import Sizes

    spec, rollout = engine_spec(config), config.rollout
    sizes = Sizes.of(config.model.name, spec.lora.target_modules if spec.lora else "all-linear")
    sampled = min(load_task_set(config).max_turns * rollout.turn_tokens, rollout.trajectory_tokens)
    work = Episodes(
        config.episodes_per_iteration,
        rollout.trajectory_tokens,
        sampled,
        rescored=config.objective.importance_cap is not None,
        epochs=config.training.epochs,
    )

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    line(
        f"recipe {config.name} on paper: {gpus.count} GPUs of {gpus.memory / 2**30:g} GiB, {gpus.bandwidth / 1e9:,.0f} "
        f"GB/s and {gpus.flops / 1e12:,.0f} TFLOP/s each; {work.count} episodes of up to {work.tokens:,} tokens per "
        f"iteration, {sampled:,} of them sampled; {sizes.parameters / 1e9:.2f} G parameters in {spec.dtype}"
    )
    for text in assumptions():
        line(f"  assumed: {text}")
    _show(line, plan(sizes, spec, work, gpus), gpus)


def _show(line: Callable[[str], None], found: Plan, gpus: Gpus) -> None:
    line("  memory of a training rank, without activations:")
    for shard, size in found.ranks.items():
        verdict = "" if size < gpus.memory else ": does NOT fit"
        line(f"    {shard:7} {size / 2**30:8.1f} GiB, {DIVIDED[shard]}{verdict}")
    if found.room <= 0:
        line(f"  a replica of the sampler: its weights ({found.replica_weights / 2**30:.1f} GiB) do NOT fit on a GPU")
        return
    line(
        f"  a replica of the sampler: weights {found.replica_weights / 2**30:.1f} GiB, and room for keys and values of "
        f"{found.room / 1e3:,.0f}k tokens; its episodes want {found.wanted / 2e3:,.0f}k on average, and "
        f"{found.wanted / 1e3:,.0f}k at their ends"
    )
    if found.waves > 1:
        line(
            f"    so {found.waves:.1f} times as many decode steps are needed. Keep keys and values in fp8 "
            "(engine.options={kv_cache_dtype: fp8}), play fewer or shorter episodes, or add GPUs"
        )
    phases = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in found.seconds.items())
    total = sum(found.seconds.values())
    line(
        f"  time per iteration, about: {duration(total)} ({phases}); ideal {duration(found.ideal)}, so "
        f"{found.ideal / total:.0%} of it. {found.cache_share:.0%} of what decoding reads are keys and values"
    )
