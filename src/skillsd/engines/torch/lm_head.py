"""A causal LM in two parts: the trunk, run once over all tokens, and the output head, run on chunks of hidden states.

With a vocabulary of 150k tokens the logits are by far the largest tensor of a micro-batch. Here at most `MAX_LOGITS` of
them exist at a time, whatever the size of the micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skillsd.errors import UserError

MAX_LOGITS = 2**25
"""The most logits that are computed at once (128 MiB in float32, and as much for each tensor derived from them)."""

MAX_LOGITS_ON_GPU = 2**26
MAX_LOGITS_OF_CHOSEN_ON_GPU = 2**28
"""The same on a GPU, which needs large matrices. For chosen tokens alone little is derived from the logits."""


class TrunkAndHead:
    """Splits `model`, a causal LM of `transformers` with or without adapters, whatever its head computes.

    Many heads are more than one matrix (scaled logits, soft caps), so the model's own `forward` runs for both parts:
    for the trunk without computing logits, for the head with the trunk replaced by a constant.

    Raises:
        UserError: if the model's trunk is not a module of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = model
        if hasattr(inner, "get_base_model"):  # inside the adapters' wrapper
            inner = inner.get_base_model()
        trunk = inner.base_model
        if trunk is inner:
            raise UserError(f"{type(inner).__name__} is not supported: its trunk is not a module of its own")
        self._name = type(inner).__name__
        self._given: Any = None  # an output for the trunk to return instead of computing
        self._wanted = False  # whether to keep the trunk's output in `_found`
        self._found: Any = None
        compute = trunk.forward

        @functools.wraps(compute)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._given is not None:
                return self._given
            output = compute(*args, **kwargs)
            if self._wanted:
                self._found = output
            return output

        trunk.forward = forward

    def hidden(self, run: Callable[..., Any], **inputs: Any) -> Tensor:
        """Hidden states ``[tokens, width]`` of one packed row. `run` is the model, or a function that calls it.

        Raises:
            UserError: if the model's trunk is not run as a module of its own.
        """
        nowhere = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
        self._wanted = True
        try:
            run(**inputs, logits_to_keep=nowhere)
            if self._found is None:  # OPT calls a part of its trunk
                raise UserError(f"{self._name} is not supported: its forward pass does not run its trunk as one module")
            self._kind, hidden = type(self._found), self._found.last_hidden_state[0]
            return hidden
        finally:
            self._wanted, self._found = False, None

    def logits(self, run: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Logits ``[tokens, vocab]`` of hidden states ``[tokens, width]``."""
        states = hidden.unsqueeze(0)
        self._given = self._kind(last_hidden_state=states)
        try:
            logits: Tensor = run(inputs_embeds=states, use_cache=False).logits[0]
            return logits
        finally:
            self._given = None


def most_logits(on_gpu: bool, only_chosen: bool) -> int:
    """The most logits that are computed at once."""
    if not on_gpu:
        return MAX_LOGITS
    return MAX_LOGITS_OF_CHOSEN_ON_GPU if only_chosen else MAX_LOGITS_ON_GPU


def in_chunks(
    hidden: Tensor, targets: Tensor, size: int, compute: Callable[..., tuple[Tensor, ...]], *more: Tensor
) -> tuple[Tensor, ...]:
    """``compute(hidden, targets, *more)``, tensors with one row per token, in chunks of at most `size` tokens.

    With several chunks and gradients, a chunk keeps no activations and is computed again in the backward pass.
    (Autograd sums the gradient of the head's weights over the chunks in their dtype.)
    """
    if len(hidden) <= size:
        return compute(hidden, targets, *more)
    chunks = zip(*(tensor.split(size) for tensor in (hidden, targets, *more)), strict=True)
    if torch.is_grad_enabled() and hidden.requires_grad:
        parts = [checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    else:
        parts = [compute(*chunk) for chunk in chunks]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
