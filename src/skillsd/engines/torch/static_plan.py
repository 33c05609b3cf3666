"""The attention of a pass of fixed shape: which tokens see which is computed on the device, from lengths."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from skillsd.engines.torch.kv_pool import KVPool

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""(query ``[slots, heads, new, dim]``, keys and values ``[slots, kv_heads, length, dim]``, bool mask
``[slots, 1, new, length]`` of the keys that each query sees, scale) -> ``[slots, heads, new, dim]``."""


def _products(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    slots, heads, new, dim = query.shape
    groups = heads // key.shape[1]
    q = query.reshape(slots, key.shape[1], groups * new, dim)
    scores = (key @ (q * scale).transpose(2, 3)).transpose(2, 3)
    weights = torch.softmax(scores.float().masked_fill(~seen.repeat(1, 1, groups, 1), -torch.inf), dim=-1)
    return (weights.to(value.dtype) @ value).view(slots, heads, new, -1)


def _fused(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=True)


ATTENTION: dict[str, Attention] = {"products": _products, "fused": _fused}
"""Implementations of the same attention. ``products`` is the reference, and fastest on a CPU. With a bool mask and
grouped heads, torch's ``fused`` kernel reads keys and values at the speed of a device copy on an H200, faster than
flash attention with lengths (2.6 of 4.3 TB/s) and than a float bias."""


class StaticPlan:
    """New tokens of some slots, `new` places each, of which the first `count` are used; the rest is padding.

    Everything is computed on the device, so the same kernels serve any lengths. A slot without new tokens, and padding,
    write to the scrap row, the pool's last, and don't influence others.

    Args:
        rows: the pool's row of each slot, int64 ``[slots]``. None: slot i is row i, and is read in place.
        start: tokens of each slot that the pool holds already, int64 ``[slots]``.
        count: new tokens of each slot, int64 ``[slots]``, at most `new`.
        length: the most tokens of a slot, the new ones included: attention reads this many keys of every slot.
        attention: a key of `ATTENTION`.
    """

    def __init__(
        self, pool: KVPool, rows: Tensor | None, start: Tensor, count: Tensor, new: int, length: int, attention: str
    ) -> None:
        self.pool, self._rows, self._new, self._length = pool, rows, new, length
        self._attention = ATTENTION[attention]
        offset = torch.arange(new, device=start.device)
        # Padding repeats the last position: one beyond the longest sequence may not exist.
        last = (count - 1).clamp_(min=0).unsqueeze(1)
        self._places = start.unsqueeze(1) + torch.minimum(offset, last)  # [slots, new]
        self.positions = self._places.view(1, -1)
        row = torch.arange(len(start), device=start.device) if rows is None else rows
        self._row = torch.where(offset < count.unsqueeze(1), row.unsqueeze(1), pool.rows - 1).flatten()
        self._slots: dict[int, Tensor] = {}  # by the number of heads, the same for all layers
        self._seen: dict[int | None, Tensor] = {}  # by window

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        heads = key.shape[1]
        if heads not in self._slots:
            self._slots[heads] = self.pool.slots(self._row, self.positions[0], heads)
        self.pool.write(layer, self._slots[heads], key, value)
        k, v = (self._read(states[layer]) for states in (self.pool.keys, self.pool.values))
        slots, (_, heads, dim) = len(self._places), query.shape
        q = query.view(slots, self._new, heads, dim).transpose(1, 2)
        out = self._attention(q, k, v, self._mask(window), scale)
        return out.transpose(1, 2).reshape(slots * self._new, heads, -1)

    def _read(self, states: Tensor) -> Tensor:
        states = states[:, :, : self._length]
        return states[: len(self._places)] if self._rows is None else states.index_select(0, self._rows)

    def _mask(self, window: int | None) -> Tensor:
        if window not in self._seen:
            key = torch.arange(self._length, device=self._places.device)
            place = self._places.unsqueeze(-1)
            seen = key <= place
            if window is not None:
                seen &= key > place - window
            self._seen[window] = seen.unsqueeze(1)
        return self._seen[window]
