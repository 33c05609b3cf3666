"""This process as one of the ranks: how it meets the others, and what they compute together with."""

from __future__ import annotations

import datetime
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from skillsd.engines.torch.ranks import launched
from skillsd.engines.torch.ranks.orders import START_SECONDS, Ranks, following, leading


@dataclass(frozen=True)
class Member:
    """This process among the ranks."""

    store: Any
    rank: int
    size: int
    ranks: Ranks | None = None
    """The other ranks, if this one leads."""


_member: Member | None = None


def leader() -> Ranks | None:
    """The other ranks, if this process leads some."""
    return _member.ranks if _member else None


def torchrun_store() -> Any:
    """Where the ranks of a torchrun find each other's addresses.

    After a restart the store still holds the addresses of ranks that are gone, so each start has keys of its own.
    """
    return dist.PrefixStore(f"skillsd-{launched.restarts()}", next(iter(dist.rendezvous("env://")))[0])


@contextmanager
def led_here() -> Iterator[bool]:
    """Whether this process is to do the work: alone, or as rank 0. The other ranks follow it, until it ends.

    Raises:
        UserError: for ranks on several machines.
        RanksLostError: if one has not started in time.
    """
    if launched.size() == 1:
        yield True
    elif launched.rank():
        follow(torchrun_store(), launched.rank(), launched.size())
        yield False
    else:
        launched.check_one_machine()
        with lead(torchrun_store(), launched.size()):
            yield True


@contextmanager
def lead(store: Any, size: int) -> Iterator[Ranks]:
    """Be rank 0."""
    global _member
    with leading(store, size, START_SECONDS) as ranks:
        _member = Member(store, 0, size, ranks)
        try:
            yield ranks
        finally:
            _member = None
    if dist.is_initialized() and not ranks.failed:
        dist.destroy_process_group()


def follow(store: Any, rank: int, size: int) -> None:
    """Be another rank, until rank 0 ends."""
    global _member
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides when to stop
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.WARNING)  # rank 0 says the same
    _member = Member(store, rank, size)
    if following(store, rank) and dist.is_initialized():
        dist.destroy_process_group()


def join(device: str, seconds: float) -> DeviceMesh:
    """The mesh over all ranks. All of them have to call this.

    Args:
        device: ``cpu`` or ``cuda``.
        seconds: the longest that ranks wait for each other in what they compute together.
    """
    assert _member is not None
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", _member.rank)))
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore("group", _member.store),
            rank=_member.rank,
            world_size=_member.size,
            timeout=datetime.timedelta(seconds=seconds),
        )
    return init_device_mesh(device, (_member.size,))


def rank() -> int:
    return _member.rank if _member else 0
