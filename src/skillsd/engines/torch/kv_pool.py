"""Keys and values of many episodes, preallocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Form = tuple[int, int, torch.dtype]
"""Heads, width and dtype of a layer's keys or values."""

COPIED_BYTES = 1 << 28
"""`KVPool.move` copies through a temporary of at most this size (or of one layer)."""


class KVPool:
    """KV caches, one row per episode: for each layer ``[rows, kv_heads, capacity, dim]``.

    On a GPU, layers of the same form lie in one tensor ``[layers, rows, kv_heads, capacity, dim]``, so that rows are
    copied in all of them at once. On a CPU each layer has its own tensor, so that a pool that grows holds one layer
    twice, not all. The forms are learnt in the first pass, in which each layer gets a tensor of its own; `emptied`
    hands them on. With them, only `reserve` allocates.

    Attributes:
        keys: layer -> its keys.
        values: layer -> its values, which may have another width (MLA).
        allocations: number of times that tensors were allocated. Addresses and shapes are valid until it changes.
    """

    GROWTH = 64  # tokens: capacity is a multiple of this

    def __init__(self, rows: int = 0, length: int = 0) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._key_forms: dict[int, Form] = {}
        self._value_forms: dict[int, Form] = {}
        self.device: torch.device | None = None  # learnt, too
        self._stacks: list[Tensor] = []  # hold all keys and values
        self._merged = True  # as `_together` wants it
        self.rows = self.capacity = self.allocations = 0
        self.most = (0, 0)  # the most rows and tokens that were reserved so far
        self.reserve(rows, length)
        self.most = (0, 0)

    def emptied(self) -> KVPool:
        """A pool without memory that allocates, at the next `reserve`, as much as this one has needed."""
        pool = KVPool(*self.most)
        pool._key_forms, pool._value_forms, pool.device = self._key_forms, self._value_forms, self.device
        return pool

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` episodes of `length` tokens."""
        self.most = (max(rows, self.most[0]), max(length, self.most[1]))
        fits = rows <= self.rows and length <= self.capacity
        if rows > self.rows:
            self.rows = max(rows, self.rows + self.rows // 4)
        if length > self.capacity:  # by at least a quarter: few copies, little waste
            self.capacity = max(-(-length // self.GROWTH) * self.GROWTH, self.capacity + self.capacity // 4)
        if self._key_forms and not (fits and self._merged and self._stacks):
            self._allocate()

    def _allocate(self) -> None:
        """Tensors of the pool's present size, with what the present ones hold."""
        self._stacks, self._merged = [], True
        self.allocations += 1
        for layers, forms in ((self.keys, self._key_forms), (self.values, self._value_forms)):
            for (heads, width, dtype), members in self._together(forms):
                shape = (len(members), self.rows, heads, self.capacity, width)
                self._stacks.append(torch.zeros(shape, dtype=dtype, device=self.device))
                for layer, new in zip(members, self._stacks[-1], strict=True):
                    old = layers.pop(layer, None)
                    if old is not None:
                        new[: old.shape[0], :, : old.shape[2]] = old
                    layers[layer] = new
                old = None  # frees the old keys before the new values are allocated

    def _together(self, forms: Mapping[int, Form]) -> list[tuple[Form, list[int]]]:
        """Which layers share a tensor."""
        if self.device is not None and self.device.type == "cpu":  # old and new tensors of one layer at a time
            return [(form, [layer]) for layer, form in forms.items()]
        return [
            (form, [layer for layer, other in forms.items() if other == form]) for form in dict.fromkeys(forms.values())
        ]

    def slots(self, rows: Tensor, positions: Tensor, heads: int) -> Tensor:
        """Where tokens at these rows and positions ``[tokens]`` are stored, for `write`: ``[tokens * heads]``."""
        # One flat index takes half the time of two indices with a slice between them.
        first = (rows.unsqueeze(1) * heads + torch.arange(heads, device=rows.device)) * self.capacity
        return (first + positions.unsqueeze(1)).flatten()

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values ``[tokens, kv_heads, dim]`` at `slots`."""
        if layer not in self.keys:
            self._first_write(layer, key, value)
        for pool, states in ((self.keys[layer], key), (self.values[layer], value)):
            pool.view(-1, pool.shape[3]).index_copy_(0, slots, states.reshape(-1, states.shape[2]))

    def _first_write(self, layer: int, key: Tensor, value: Tensor) -> None:
        assert layer not in self._key_forms, "a pool that knows its layers has to be reserved before it is written to"
        self.allocations, self.device = self.allocations + 1, key.device
        self._merged = key.device.type == "cpu"
        for layers, forms, states in (
            (self.keys, self._key_forms, key),
            (self.values, self._value_forms, value),
        ):
            forms[layer] = (states.shape[1], states.shape[2], states.dtype)
            stack = states.new_zeros(1, self.rows, states.shape[1], self.capacity, states.shape[2])
            self._stacks.append(stack)
            layers[layer] = stack[0]

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens of rows, all at once, so that rows can be swapped."""
        # Without tokens there is nothing to copy, and a new episode's row may be beyond the pool until `reserve`.
        if not sources or not length or not self._stacks:
            return
        from_to = torch.tensor([list(sources), list(targets)])
        if self._stacks[0].is_cuda:
            from_to = from_to.pin_memory().to(self._stacks[0].device, non_blocking=True)
        source, target = from_to
        for stack in self._stacks:
            one = len(sources) * length * stack.shape[2] * stack.shape[4] * stack.element_size()
            for part in stack.split(max(1, COPIED_BYTES // one)):
                part[:, target, :, :length] = part[:, source, :, :length]

    def bytes(self) -> int:
        return sum(stack.numel() * stack.element_size() for stack in self._stacks)
