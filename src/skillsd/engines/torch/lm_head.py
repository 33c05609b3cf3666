"""A causal LM in two halves: the trunk, once over all tokens, and the head, over a few hidden states at a time.

With a vocabulary of 150k tokens the logits of a micro-batch are by far its largest tensor. Here they exist for
`MAX_LOGITS` numbers at a time, whatever the micro-batch.
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
"""The most logits that are computed at once (128 MiB in float32, and as much again for each thing made of them)."""


class TrunkAndHead:
    """Splits `model`, a causal LM of `transformers` or an adapter around one, without knowing what its head does.

    Many heads are more than one matrix (scaled logits, soft caps), so the model's own `forward` runs for either half:
    for the trunk without wanting any logits, for the head with the trunk's part of the work left out.
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = model
        if hasattr(inner, "get_base_model"):  # beneath adapters
            inner = inner.get_base_model()
        trunk = inner.base_model
        if trunk is inner:
            raise UserError(f"{type(inner).__name__} is not supported: its trunk and its head are not apart")
        self._given: Any = None  # an output that the trunk is to return as its own
        self._wanted = False  # whether to keep what it computes
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
        """The trunk's hidden states ``[tokens, width]`` of one packed row; `run` is the model, or calls it."""
        nowhere = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
        self._wanted = True
        try:
            run(**inputs, logits_to_keep=nowhere)
            self._kind, hidden = type(self._found), self._found.last_hidden_state[0]
            return hidden
        finally:
            self._wanted, self._found = False, None

    def logits(self, run: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The head's ``[tokens, vocabulary]``."""
        states = hidden.unsqueeze(0)
        self._given = self._kind(last_hidden_state=states)
        try:
            logits: Tensor = run(inputs_embeds=states, use_cache=False).logits[0]
            return logits
        finally:
            self._given = None


def in_chunks(
    hidden: Tensor, targets: Tensor, vocabulary: int, compute: Callable[..., tuple[Tensor, ...]], *more: Tensor
) -> tuple[Tensor, ...]:
    """``compute(hidden, targets, *more)``, tensors with one row per token, in chunks of at most `MAX_LOGITS` logits.

    Where that is not all of them and gradients are wanted, a chunk keeps nothing for its backward pass: it is computed
    again then. (The head's own gradient is summed over the chunks in the weights' format, by autograd.)
    """
    size = max(1, MAX_LOGITS // vocabulary)
    if len(hidden) <= size:
        return compute(hidden, targets, *more)
    chunks = zip(*(tensor.split(size) for tensor in (hidden, targets, *more)), strict=True)
    if torch.is_grad_enabled() and hidden.requires_grad:
        parts = [checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    else:
        parts = [compute(*chunk) for chunk in chunks]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
