"""What an iteration's line in metrics.jsonl says. Names are ``section/figure``; times are in seconds."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from skillsd.engines.base import Engine
from skillsd.rollouts.collect import Collected, outcome_counts
from skillsd.training.batches import Batch
from skillsd.training.lessons import Lesson

if TYPE_CHECKING:
    from skillsd.training.run import Run


def describe_rollouts(collected: Collected, seconds: float) -> dict[str, float]:
    """How the student's episodes went."""
    trajectories = [t for group in collected.groups for t in group.trajectories]
    count = max(1, len(trajectories))
    tokens = sum(t.action_tokens for t in trajectories)
    return {
        "rollout/accuracy": sum(t.success for t in trajectories) / count,
        "rollout/reward": sum(t.score for t in trajectories) / count,
        "rollout/turns": sum(len(t.turns) for t in trajectories) / count,
        "rollout/tokens": sum(len(t.tokens) for t in trajectories) / count,
        "rollout/sampled_tokens_per_second": tokens / seconds if seconds else 0.0,
        **{f"outcome/{name}": n / count for name, n in outcome_counts(collected.groups).items()},
        **{f"broken/{name}": n for name, n in collected.broken.items()},
        "rollout/dropped_groups": len(collected.dropped),
    }


def describe_batch(batch: Batch, lessons: Sequence[Lesson]) -> dict[str, float]:
    """What the batch gave to learn from, as shares of its groups."""
    count = max(1, len(batch.groups))
    return {
        "batch/groups_of_equal_reward": batch.flat / count,
        "batch/groups_with_teacher": sum(batch.taught) / count,
        "batch/skills_over_budget": (batch.untold + sum(lesson.too_long for lesson in lessons)) / count,
        **({"batch/imitated": batch.imitated / count} if batch.imitated else {}),
    }


def describe_skills(run: Run, written: int) -> dict[str, float]:
    """The bank's growth, and what became of the summaries since the start."""
    if run.summaries is None:
        return {}
    stats = run.summaries.stats()
    cost = run.config.summariser.cost(stats.get("tokens_in", 0), stats.get("tokens_out", 0))
    return {
        "skills/new": written,
        **{f"skills/{name}": n for name, n in run.bank.counts().items()},
        **{f"summaries/{name}": n for name, n in stats.items()},
        **({} if cost is None else {"summaries/cost": cost}),
    }


def describe_system(engine: Engine) -> dict[str, float]:
    """Peak memory of this process in MiB, and the GPU's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"memory/peak_mib": peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)}
    device = getattr(engine, "device", None)
    if device is not None and device.type == "cuda":
        import torch

        figures["memory/gpu_peak_mib"] = torch.cuda.max_memory_allocated(device) / (1 << 20)
    return figures
