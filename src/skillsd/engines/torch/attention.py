"""Attention over packed tokens, plugged into the model classes of `transformers`.

Every forward pass of the engine is over one row of *packed* tokens, ``[1, tokens]``: several sequences, concatenated
without padding, so that all position-wise layers (projections, MLP, norms, lm_head) compute real tokens only. Attention
alone needs the sequences' boundaries. It gets them from a *plan*, passed through the model as a keyword argument:

- `PackedPlan`: whole sequences, causal, differentiable (scoring and training). A prefix that neighbours share, such as
  the prompt of a group of episodes, is packed and computed once;
- `CachedPlan`: new tokens of many episodes, with their KV caches (prefill and decoding together).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from skillsd.engines.torch import varlen
from skillsd.engines.torch.kv_pool import KVPool

NAME = "skillsd_packed"


class Plan(Protocol):
    """Which tokens see which."""

    positions: Tensor
    """``[1, tokens]``: position of each packed token in its own sequence."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Packed ``[tokens, heads, dim]`` (key and value may have fewer heads) -> ``[tokens, heads, dim]``."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    plan: Plan | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What `transformers` calls in each layer. query, key, value: ``[1, heads, tokens, dim]``."""
    if plan is None:
        raise RuntimeError(f"{type(module).__name__} does not pass keyword arguments on to its attention function")
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} needs attention with {name!r}")
    if dropout:
        raise NotImplementedError("attention dropout is not supported: trained and sampled log-probs would differ")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = plan.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale,
        sliding_window,
    )
    return out.unsqueeze(0), None


# No mask function is registered under this name, so the model classes don't build masks.
AttentionInterface.register(NAME, _attention)


class _Collect(torch.autograd.Function):
    """Padded ``[slots, ...]`` -> packed ``[tokens, ...]``: each token from its `first` slot."""

    @staticmethod
    def forward(ctx: Any, spread: Tensor, first: Tensor) -> Tensor:
        ctx.save_for_backward(first)
        ctx.slots = spread.shape[0]
        return spread.index_select(0, first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (first,) = ctx.saved_tensors
        grad = grads[0]
        return grad.new_zeros(ctx.slots, *grad.shape[1:]).index_copy_(0, first, grad), None


def _bias(places: Tensor, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Attention bias ``[..., keys]`` of queries at the positions `places` ``[...]``: 0 for visible keys, else -inf."""
    key = torch.arange(keys, device=places.device)
    unseen = key > places.unsqueeze(-1)
    if window is not None:
        unseen |= key <= places.unsqueeze(-1) - window
    return torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)


def _repeat_heads(states: Tensor, heads: int) -> Tensor:
    """``[batch, kv_heads, length, dim]`` -> ``[batch, heads, length, dim]`` for grouped-query attention."""
    repeats = heads // states.shape[1]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


class PackedPlan:
    """Whole sequences, packed one after the other.

    Attention is by a kernel that knows the sequences' lengths, where there is one for the tensors at hand. Elsewhere
    they are padded to the longest.

    Args:
        lengths: of the sequences, shared prefixes included.
        shared: for each sequence, the length of the prefix that it shares with the previous one and that is not packed
            again; 0 for the first. None: no sharing.
        kernel_for: finds the kernel; `varlen.kernel_for` if None.

    Attributes:
        source: for each sequence, the places of its tokens in the packed row.
        windows: layer -> the sliding window that the model asked for, None for none. Layers that don't use this
            attention are missing.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        shared: Sequence[int] | None = None,
        kernel_for: Callable[[Tensor, Tensor, float, int | None], varlen.Kernel | None] | None = None,
    ) -> None:
        self._lengths, self._device = lengths, device
        self._kernel_for = kernel_for or varlen.kernel_for
        self._shared = shared or [0] * len(lengths)
        self.windows: dict[int, int | None] = {}
        self.source: list[Tensor] = []
        positions = []  # of each packed token in its sequence
        size = 0
        for length, taken in zip(lengths, self._shared, strict=True):
            new = torch.arange(size, size + length - taken)
            self.source.append(torch.cat([self.source[-1][:taken], new]) if taken else new)
            positions.append(torch.arange(taken, length))
            size += length - taken
        self.positions = torch.cat(positions).unsqueeze(0).to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        self.windows[layer] = window
        kernel = self._kernel_for(query, value, scale, window)
        if kernel is not None:
            return self._ragged.attend(kernel, query, key, value, scale, window)
        return self._padded.attend(query, key, value, scale, window)

    @cached_property
    def _ragged(self) -> varlen.Layout:
        return varlen.Layout(self._lengths, self._shared, self.source, self._device)

    @cached_property
    def _padded(self) -> _Padded:
        return _Padded(self._lengths, self._shared, self.source, self._device)


class _Padded:
    """Attention of packed sequences in a padded layout. Arguments as for `varlen.Layout`."""

    def __init__(
        self, lengths: Sequence[int], shared: Sequence[int], source: Sequence[Tensor], device: torch.device
    ) -> None:
        self.batch, self.longest = len(lengths), max(lengths)
        # With equal lengths and no shared prefixes, packed and padded layouts coincide: no tokens have to be moved.
        self._even = sum(lengths) - sum(shared) == self.batch * self.longest
        self._again: Tensor | None = None
        self._biases: dict[int, Tensor] = {}  # by window, the same for all layers
        if not self._even:
            slots = torch.zeros(self.batch, self.longest, dtype=torch.long)  # padding: any token, no query sees it
            again = torch.zeros(self.batch, self.longest, dtype=torch.bool)
            for row, (places, taken) in enumerate(zip(source, shared, strict=True)):
                slots[row, : len(places)] = places
                again[row, :taken] = True
            first = [
                row * self.longest + torch.arange(taken, length)
                for row, (length, taken) in enumerate(zip(lengths, shared, strict=True))
            ]
            self._source, self._first = slots.flatten().to(device), torch.cat(first).to(device)
            self._again = again.flatten().nonzero().squeeze(1).to(device) if again.any() else None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        heads = query.shape[1]
        # A shared prefix's queries are used in its first sequence only; its keys and values get gradients from all.
        q, k, v = self._pad(query, None), self._pad(key, self._again), self._pad(value, self._again)
        k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
        if window is not None and self.longest > window:
            out = F.scaled_dot_product_attention(q, k, v, self._bias(window, q), scale=scale)
        else:
            # Padding comes after each sequence's end, so causal attention hides it from all real queries.
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        out = out.transpose(1, 2).reshape(self.batch * self.longest, heads, -1)
        return out if self._even else _Collect.apply(out, self._first)

    def _bias(self, window: int, like: Tensor) -> Tensor:
        """Attention bias ``[longest, longest]`` of a sliding window."""
        if window not in self._biases:
            places = torch.arange(self.longest, device=like.device)
            self._biases[window] = _bias(places, self.longest, window, like.dtype)
        return self._biases[window]

    def _pad(self, states: Tensor, again: Tensor | None) -> Tensor:
        """``[tokens, heads, dim]`` -> ``[batch, heads, longest, dim]``."""
        if not self._even:
            states = varlen.spread(states, self._source, self._first, again)
        return states.reshape(self.batch, self.longest, *states.shape[1:]).transpose(1, 2)


class CachedPlan:
    """`counts[i]` new tokens of the episode in row `rows[i]` of the pool, after `starts[i]` cached ones."""

    def __init__(
        self, pool: KVPool, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> None:
        self.pool = pool
        count, start = torch.tensor(counts), torch.tensor(starts)
        index = torch.repeat_interleave(torch.arange(len(rows)), count)
        first = torch.cumsum(count, 0) - count  # place of each episode's first new token in the packed row
        offset = torch.arange(len(index)) - first[index]
        position = start[index] + offset
        self.last = first + count - 1  # and of its last one
        self.positions = position.unsqueeze(0)
        self._row = torch.tensor(rows)[index]
        self._slots: dict[int, Tensor] = {}  # by the number of heads, the same for all layers
        several = (count > 1).nonzero().squeeze(1)
        if 2 * len(several) < len(rows):
            # Most episodes decode one token, a few have a new observation, whose many queries would pad the others'. So
            # two blocks. The block of single queries covers all rows, so that they can be read in place.
            single = (count == 1).nonzero().squeeze(1)
            self._blocks = [_Block(rows, start, first[single], single)]
            if len(several):
                tokens = (count[index] > 1).nonzero().squeeze(1)
                most = int(count.max())
                slots = torch.searchsorted(several, index[tokens]) * most + offset[tokens]
                where = [rows[i] for i in several.tolist()]
                self._blocks.append(_Block(where, start[several], tokens, slots, most))
        else:
            most = int(count.max())
            self._blocks = [_Block(rows, start, torch.arange(len(index)), index * most + offset, most)]
        _upload([(self, ("last", "positions", "_row")), *((block, block.TENSORS) for block in self._blocks)], device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        heads = key.shape[1]
        if heads not in self._slots:
            self._slots[heads] = self.pool.slots(self._row, self.positions[0], heads)
        self.pool.write(layer, self._slots[heads], key, value)
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        if len(self._blocks) == 1:
            return self._blocks[0].attend(query, keys, values, scale, window)
        out = query.new_empty(query.shape[0], query.shape[1], values.shape[3])
        for block in self._blocks:
            part = query.index_select(0, block.tokens)
            out.index_copy_(0, block.tokens, block.attend(part, keys, values, scale, window))
        return out


def _upload(fields: Sequence[tuple[Any, tuple[str, ...]]], device: torch.device) -> None:
    """Move the int64 tensors in these fields of objects to the device: to a GPU in one copy that does not wait."""
    if device.type == "cpu":
        return
    found = [(owner, name) for owner, names in fields for name in names if isinstance(getattr(owner, name), Tensor)]
    tensors = [getattr(owner, name) for owner, name in found]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for (owner, name), tensor, part in zip(found, tensors, parts, strict=True):
        setattr(owner, name, part.view(tensor.shape))


class _Block:
    """The queries of some rows of the pool, in `most` slots per row: the tokens from position `start` on.

    Args:
        tokens: places of the queries in the packed row.
        slots: the slot of each of them, of ``rows * most``. The other slots are padding.
    """

    TENSORS = ("tokens", "_slots", "_places", "_rows")
    """Fields to move to the device."""

    def __init__(self, rows: Sequence[int], start: Tensor, tokens: Tensor, slots: Tensor, most: int = 1) -> None:
        self.tokens = tokens
        self._batch, self._most = len(rows), most
        # None: no padding, so nothing has to be moved.
        self._slots = slots if len(slots) < len(rows) * most else None
        self._places = start.unsqueeze(1) + torch.arange(most)  # [rows, most]
        self._longest = int((start[slots // most] + slots % most).max()) + 1
        # Consecutive rows are read in place; others have to be copied.
        together = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self._rows = slice(rows[0], rows[0] + len(rows)) if together else torch.tensor(rows)
        self._biases: dict[tuple[int | None, int], Tensor] = {}  # shared by layers with the same window

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
        """Queries ``[tokens, heads, dim]`` of this block and a layer's keys and values -> ``[tokens, heads, dim]``."""
        k, v = keys[self._rows, :, : self._longest], values[self._rows, :, : self._longest]
        heads, kv_heads, dim = query.shape[1], k.shape[1], query.shape[2]
        if self._slots is not None:
            query = query.new_zeros(self._batch * self._most, heads, dim).index_copy_(0, self._slots, query)
        # Grouped-query attention without copying keys: heads that share a key head become further queries of it.
        repeats = heads // kv_heads
        q = query.view(self._batch, self._most, kv_heads, repeats, dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(self._batch, kv_heads, repeats * self._most, dim)
        bias = self._bias(window, repeats, q.dtype)
        if self._most == 1 and q.device.type == "cpu" and q.dtype == torch.float32:
            # Plain products are faster here than the CPU's fused kernel, which is optimised for many queries. In this
            # order, because (keys x query) streams through memory faster than (query x keys).
            scores = (k @ (q * scale).transpose(2, 3)).transpose(2, 3)
            out = torch.softmax(scores + bias, dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
        out = out.view(self._batch, kv_heads, repeats, self._most, -1).permute(0, 3, 1, 2, 4)
        out = out.reshape(self._batch * self._most, heads, -1)
        return out if self._slots is None else out.index_select(0, self._slots)

    def _bias(self, window: int | None, repeats: int, dtype: torch.dtype) -> Tensor:
        """Attention bias ``[rows, 1, repeats * most, longest]``."""
        if (window, repeats) not in self._biases:
            bias = _bias(self._places, self._longest, window, dtype)
            self._biases[window, repeats] = bias.unsqueeze(1).repeat(1, 1, repeats, 1)
        return self._biases[window, repeats]
