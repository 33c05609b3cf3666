"""Tensors that ranks hold slices of (`torch.distributed.tensor.DTensor`), beside ordinary ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_sliced(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sliced tensor, for which all ranks have to call this; any other tensor as it is."""
    found: Tensor = tensor.full_tensor() if is_sliced(tensor) else tensor  # type: ignore[attr-defined]
    return found


def own_part(tensor: Any, like: Tensor) -> Any:
    """The slice of a whole `tensor` that this rank holds, if `like` is sliced and has its shape; else `tensor`."""
    if not is_sliced(like) or not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    tensor = tensor.to(like.device)
    # Cloned: the slice would be a view, which keeps the whole tensor in memory, and changes with it.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()


def local_numel(tensor: Tensor) -> int:
    """Number of elements that this rank holds."""
    return (tensor.to_local() if is_sliced(tensor) else tensor).numel()  # type: ignore[attr-defined]


def gathered(tree: Any, *, keep: bool) -> Any:
    """A nested structure with its sliced tensors whole, on the CPU. All ranks have to call this.

    Args:
        keep: False drops each tensor once it is gathered, on ranks that don't need it.
    """
    if isinstance(tree, Tensor):
        if not is_sliced(tree):
            return tree
        found = whole(tree.detach())
        return found.cpu() if keep else torch.empty(0)
    if isinstance(tree, Mapping):
        return {key: gathered(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, keep=keep) for value in tree)
    return tree
