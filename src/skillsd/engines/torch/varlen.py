"""Attention over packed sequences without padding: variable-length flash attention, where torch and the GPU have it.

Sequences that share a prefix have it packed once. Their keys are then gathered, each sequence's own and those of its
prefix, so that the kernel sees whole sequences of keys, and of queries only those that are packed: the last ones. Flash
attention aligns queries and keys at their ends, as this needs. The cost is one copy of keys and values; the copy's
gradient adds up the gradients that a shared key gets from all its sequences.

Alternatives: `flex_attention` on the packed row is as fast (H200, torch 2.11), but compiles for 13 s. Parts merged by
their log-sum-exp need the gradient of that, which the kernel does not give.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, "Layout", float, int | None], Tensor]
"""(queries ``[tokens, heads, dim]``, keys and values ``[keys, kv_heads, dim]``, layout, scale, window) -> output
``[tokens, heads, dim]``."""

MAX_HEAD_DIM = 256


class Layout:
    """Which keys the packed queries see.

    Args:
        lengths, shared: as for `PackedPlan`.
        source: for each sequence, the places of its tokens in the packed row.

    Attributes:
        queries, keys: int32 ``[sequences + 1]``: where the queries and the keys of each sequence begin, and the end.
        longest_query, longest_key: the most of one sequence.
    """

    def __init__(
        self, lengths: Sequence[int], shared: Sequence[int], source: Sequence[Tensor], device: torch.device
    ) -> None:
        # A sequence without tokens of its own has no queries, so its keys are not needed either.
        used = [i for i, (length, taken) in enumerate(zip(lengths, shared, strict=True)) if length > taken]
        counts = torch.tensor([[lengths[i] - shared[i], lengths[i]] for i in used])
        ends = torch.cat([torch.zeros(1, 2, dtype=torch.long), counts.cumsum(0)])
        self.queries, self.keys = ends.T.to(device, torch.int32).contiguous()
        self.longest_query, self.longest_key = counts.max(0).values.tolist()
        self._gather: tuple[Tensor, Tensor, Tensor] | None = None
        if any(shared):
            is_first = torch.cat([torch.arange(lengths[i]) >= shared[i] for i in used])
            first, again = is_first.nonzero().squeeze(1), (~is_first).nonzero().squeeze(1)
            gathered, first, again = (x.to(device) for x in (torch.cat([source[i] for i in used]), first, again))
            self._gather = gathered, first, again

    def attend(
        self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Packed ``[tokens, heads, dim]`` (key and value may have fewer heads) -> ``[tokens, heads, dim]``."""
        if self._gather is not None:
            key, value = spread(key, *self._gather), spread(value, *self._gather)
        return kernel(query, key, value, self, scale, window)


class _Spread(torch.autograd.Function):
    """Packed ``[tokens, ...]`` -> ``[slots, ...]``: `source` is the token of each slot.

    The backward pass of index_select would add up the slots' gradients one by one, which is several times slower on a
    CPU. Here a token's gradient is that of its `first` slot plus those of its `again` slots. Other slots must have no
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, first: Tensor, again: Tensor | None) -> Tensor:
        ctx.save_for_backward(source, first, again)
        return tokens.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, first, again = ctx.saved_tensors
        grad = grads[0].index_select(0, first)
        if again is not None:  # sums of many, so in float32, whatever the states' dtype
            total = grad.float().index_add_(0, source[again], grads[0].index_select(0, again).float())
            grad = total.to(grad.dtype)
        return grad, None, None, None


def spread(tokens: Tensor, source: Tensor, first: Tensor, again: Tensor | None) -> Tensor:
    """The packed `tokens` ``[tokens, ...]`` in slots: `source` ``[slots]`` is the token of each.

    Args:
        first: the first slot of each token.
        again: the further slots of tokens that have several. The slots in neither must have no gradient.
    """
    spread_out: Tensor = _Spread.apply(tokens, source, first, again)
    return spread_out


def kernel_for(query: Tensor, value: Tensor, scale: float, window: int | None) -> Kernel | None:
    """The kernel for these queries and values, or None if there is none: then sequences have to be padded."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    dim = query.shape[-1]
    try:
        if dim != value.shape[-1] or dim > MAX_HEAD_DIM or dim % 8:
            raise NotImplementedError(f"heads of width {dim}, {value.shape[-1]}")
        if torch.cuda.get_device_capability(query.device) < (8, 0):
            raise NotImplementedError("a GPU older than Ampere")
        return _torch_kernel(scale == dim**-0.5, window is None)
    except NotImplementedError as error:
        _note(f"no variable-length attention for {error}: sequences are padded to the longest, which is slower")
        return None


@functools.cache
def _torch_kernel(default_scale: bool, no_window: bool) -> Kernel:
    """`varlen_attn` as the installed torch has it; its arguments differ between versions.

    Raises:
        NotImplementedError: if there is none with a scale or a window.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise NotImplementedError(f"torch {torch.__version__}") from error
    takes = inspect.signature(varlen_attn).parameters
    if ("scale" not in takes and not default_scale) or ("window_size" not in takes and not no_window):
        raise NotImplementedError(f"a model's own scale or window in torch {torch.__version__}")

    def kernel(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
        options: dict[str, Any] = {} if default_scale else {"scale": scale}
        if "window_size" in takes:  # keys to the left and to the right of a query's place
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            options["is_causal"] = True
        if query.shape[1] != key.shape[1] and "enable_gqa" in takes:  # older versions take fewer key heads unasked
            options["enable_gqa"] = True
        out = varlen_attn(
            query, key, value, layout.queries, layout.keys, layout.longest_query, layout.longest_key, **options
        )
        assert isinstance(out, Tensor)
        return out

    return kernel


@functools.cache
def _note(text: str) -> None:
    """Log a warning, the first time that it is given."""
    log.warning(text)
