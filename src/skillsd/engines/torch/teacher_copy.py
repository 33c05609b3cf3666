"""The teacher's own weights, moved towards the student's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from skillsd.engines.torch.optimiser import MasterAdamW
from skillsd.engines.torch.slices import is_sliced, whole

STALE = (
    "the teacher follows the student and has no weights of its own, and the student was updated since the last "
    "sync_teacher(). Sync first, or make the engine with teacher_follows=False"
)


def check_rate(rate: float, *, averages: bool) -> None:
    """Check the rate of a sync.

    Args:
        averages: whether the teacher has weights of its own.

    Raises:
        ValueError: as `Learner.sync_teacher`.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"the rate of a teacher sync is {rate}; it must be above 0 and at most 1")
    if not averages and rate != 1:
        raise ValueError(
            f"a teacher that follows the student has no weights of its own to average (rate {rate}): sync with "
            "rate 1, or make the engine with teacher_follows=False"
        )


def move_towards(
    optimiser: MasterAdamW, teacher: Mapping[str, Tensor], averages: dict[str, Tensor], rate: float
) -> None:
    """Set the teacher to ``(1 - rate) * teacher + rate * student``, in place: CUDA graphs read these tensors.

    Args:
        optimiser: of the student's weights; in the teacher's order.
        averages: float32 copies of bfloat16 weights, which are averaged instead: rounded at every sync, a moving
            average in bfloat16 would never move.
    """
    if rate == 1:
        averages.clear()
    with torch.no_grad():
        for (name, weight), own, master in zip(teacher.items(), optimiser.parameters, optimiser.masters, strict=True):
            if rate == 1:
                weight.copy_(own)
            elif weight.dtype == torch.float32:
                weight.lerp_(own, rate)
            else:
                if name not in averages:
                    averages[name] = weight.float()
                weight.copy_(averages[name].lerp_(master if is_sliced(weight) else whole(master), rate))
