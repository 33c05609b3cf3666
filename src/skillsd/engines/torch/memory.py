"""Out of memory, on a GPU or on the CPU: one line with the phase and the settings that reduce it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from skillsd.errors import EngineFailedError

Phase = Literal["loading the model", "sampling", "scoring", "computing gradients", "updating the weights"]

REMEDIES: dict[Phase, str] = {
    "loading the model": "Set model.dtype=bfloat16, use a smaller model, or model.device=cpu",
    "sampling": "Lower rollout.concurrency or rollout.trajectory_tokens",
    "scoring": "Lower training.micro_batch_tokens or rollout.trajectory_tokens",
    "computing gradients": "Lower training.micro_batch_tokens, or set model.gradient_checkpointing=true, model.lora={}",
    "updating the weights": "Set model.lora={} (fewer trained weights), or use a smaller model",
}

_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "ALLOC_FAILED")
"""In the RuntimeErrors of allocators that raise no class of their own: the CPU's, cuBLAS's, a driver's."""


@contextmanager
def explained(phase: Phase) -> Iterator[None]:
    """Raise an `EngineFailedError` that names the phase and the settings if the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        detail = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise EngineFailedError(
            f"out of memory while {phase}. {REMEDIES[phase]}; `skillsd doctor` estimates what a recipe needs. A run "
            f"goes on from its last checkpoint with `skillsd train --resume`. (torch: {detail[:200]})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
