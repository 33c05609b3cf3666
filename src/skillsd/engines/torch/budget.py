"""``training.micro_batch_tokens: auto``: as many tokens in a forward pass as the memory of a GPU allows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from skillsd.engines.options import LoraOptions
from skillsd.engines.torch.lm_head import MAX_LOGITS_OF_CHOSEN_ON_GPU
from skillsd.engines.torch.optimiser import MasterAdamW
from skillsd.engines.torch.sizes import Sizes

log = logging.getLogger(__name__)

Budget = int | Literal["auto"]

ON_CPU = 8192
"""`auto` on a CPU, where larger passes are no faster."""

LEAST, MOST = 1024, 65_536
"""Limits of `auto` on a GPU. Above the upper one nothing is gained."""

SHARE = 0.8
"""Of the free memory: what a token needs is an estimate, and fragmentation is not in it."""

LOGITS = 2 * 2 * MAX_LOGITS_OF_CHOSEN_ON_GPU
"""Bytes of a chunk of logits and its gradient in bfloat16."""

KEPT = 1.4
"""Activations kept for the backward pass, per input or output of a weight matrix: with norms, rotations and gates."""


def kept_per_token(sizes: Sizes, width: int, *, lora: bool, recomputed: bool) -> int:
    """Bytes of activations that the update keeps for each token, without logits.

    Args:
        width: bytes of a weight.
        recomputed: with `model.gradient_checkpointing`.
    """
    kept = sizes.layers * one_layer(sizes) * width
    if lora and width < 4:
        kept += sizes.adapted_in * 4  # peft keeps an adapter's input in float32
    return kept // sizes.layers + sizes.layers * sizes.hidden * width if recomputed else kept


def one_layer(sizes: Sizes) -> int:
    """Activations of one layer per token."""
    return round(KEPT * sizes.flow / sizes.layers)


def tokens_that_fit(free: int, sizes: Sizes, width: int, *, lora: bool, recomputed: bool) -> int:
    """The most tokens of one training pass, with gradients, on a GPU with `free` bytes.

    Rounded down to 2 ** n or 1.5 * 2 ** n, so that it is the same in each run on the same machine.
    """
    each = kept_per_token(sizes, width, lora=lora, recomputed=recomputed) + one_layer(sizes) * width
    most = int((SHARE * free - LOGITS) // each)
    if most <= LEAST:
        return LEAST
    step = 1 << max(0, min(most, MOST).bit_length() - 2)
    return min(most, MOST) // step * step


def budget_of(
    given: Budget,
    model: nn.Module,
    base: str,
    optimiser: MasterAdamW,
    lora: LoraOptions | None,
    recomputed: bool,
) -> Callable[[], int]:
    """The number of tokens, once it is needed: by then everything else has taken its memory.

    Args:
        given: a number, or ``auto``.
        base: folder or hub name of the model without adapters.
        optimiser: memory for gradients and moments that it does not have yet is kept free.
        recomputed: activations are recomputed in the backward pass.
    """
    weight = next(model.parameters())
    device, width = weight.device, weight.element_size()

    def find() -> int:
        if given != "auto":
            return given
        if device.type != "cuda":
            return ON_CPU
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused - optimiser.missing_bytes()
        sizes = Sizes.of(base, lora.target_modules if lora else "all-linear")
        found = tokens_that_fit(free, sizes, width, lora=lora is not None, recomputed=recomputed)
        log.info("micro-batches of %d tokens, by %.1f GiB of free memory", found, free / 2**30)
        return found

    return find
