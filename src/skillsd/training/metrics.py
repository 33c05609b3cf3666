"""The metrics of an iteration, a line of metrics.jsonl. Names are ``section/metric``; times are in seconds.

``docs/metrics.md`` lists them all with their meaning.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from skillsd.engines.base import Learner
from skillsd.objective import ACTION_MASK, TEACHER_MASK
from skillsd.rollouts.collect import outcome_counts
from skillsd.training.batch import Batch
from skillsd.training.rollouts import Rollouts, TeacherContext

if TYPE_CHECKING:
    from skillsd.training.run import Run


def describe_rollouts(rollouts: Rollouts) -> dict[str, float]:
    """Metrics of a rollout phase's episodes, without those of groups that only keep up the student's reading."""
    collected, groups = rollouts.collected, rollouts.plain
    trajectories = [t for group in groups for t in group.trajectories]
    kept_up = [t.success for group in rollouts.readers for t in group.trajectories]
    count = max(1, len(trajectories))
    tokens = sum(t.action_tokens for t in trajectories)
    sampled = sum(t.action_tokens for group in collected.groups for t in group.trajectories)
    surprisal = -sum(math.fsum(t.logprobs) for t in trajectories)  # 0 at tokens that were not sampled
    return {
        "rollout/accuracy": sum(t.success for t in trajectories) / count,
        "rollout/reward": sum(t.reward for t in trajectories) / count,
        "rollout/turns": sum(len(t.turns) for t in trajectories) / count,
        "rollout/tokens": sum(len(t.tokens) for t in trajectories) / count,
        "rollout/sampled_tokens_per_second": sampled / rollouts.seconds if rollouts.seconds else 0.0,
        "rollout/entropy_estimate": surprisal / tokens if tokens else math.nan,
        "rollout/reward_std_in_groups": _mean([statistics.pstdev(group.rewards) for group in groups]),
        **{f"outcome/{name}": n / count for name, n in outcome_counts(groups).items()},
        **{f"infra_failures/{name}": n for name, n in collected.infra_failures.items()},
        "rollout/dropped_groups": len(collected.dropped),
        **({"reading/kept_up": _mean(kept_up)} if kept_up else {}),
    }


def describe_batch(
    batch: Batch, contexts: Sequence[TeacherContext], in_prompt: Sequence[bool] | None
) -> dict[str, float]:
    """Metrics of the training batch, as shares of the groups or of the action tokens.

    Args:
        contexts: of each group.
        in_prompt: for each group, whether its context was in a prompt of student or teacher; None if the method has no
            context.
    """
    count = max(1, len(batch.groups))
    signals = [item.signals for items in batch.groups for item in items]
    tokens, taught = (sum(int(s[mask].sum()) for s in signals) for mask in (ACTION_MASK, TEACHER_MASK))
    return {
        "batch/zero_advantage_groups": batch.zero_advantage / count,
        "batch/groups_with_teacher": sum(batch.taught) / count,
        "batch/tokens_with_teacher": taught / max(1, tokens),
        **({} if in_prompt is None else {"batch/groups_with_context": sum(in_prompt) / count}),
        "batch/skills_over_budget": (batch.without_teacher + sum(context.too_long for context in contexts)) / count,
        **({"batch/imitated": batch.imitated / count} if batch.imitated else {}),
    }


def describe_skills(run: Run, added: int) -> dict[str, float]:
    """Metrics of the bank, and counts of summaries since the start of the run.

    Args:
        added: number of skills that were added in this iteration.
    """
    if run.summaries is None:
        return {}
    stats = run.summaries.stats()
    cost = run.config.summariser.cost(stats.get("tokens_in", 0), stats.get("tokens_out", 0))
    counts = run.bank.counts()
    return {
        "skills/new": added,
        **{f"skills/{name}": n for name, n in counts.items()},
        **({"skills/first_picks": counts["picked"] / counts["picks"]} if counts["picks"] else {}),
        **{f"summaries/{name}": n for name, n in stats.items()},
        **({} if cost is None else {"summaries/cost": cost}),
    }


def describe_system(learner: Learner) -> dict[str, float]:
    """Peak memory in MiB, of this process and of the GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"memory/peak_mib": peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)}
    device = getattr(learner, "device", None)
    if device is not None and device.type == "cuda":
        import torch

        figures["memory/gpu_peak_mib"] = torch.cuda.max_memory_allocated(device) / (1 << 20)
    return figures


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
