"""The teacher's own weights, moved towards the student's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from skillsd.engines.torch.optimiser import MasterAdamW


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
                weight.lerp_(master, rate)
            else:
                if name not in averages:
                    averages[name] = weight.float()
                weight.copy_(averages[name].lerp_(master, rate))
