"""Weights from the learner's GPU memory into vLLM's, by the packed form of vLLM's weight-transfer back end ``ipc``.

Written against vLLM 0.32.0. The weights are copied into a buffer, as many as fit, and vLLM's process opens that buffer
by CUDA's inter-process handles, loads them, and the buffer is filled again. The buffer lies on vLLM's GPU, so this
works on one GPU and between two. Adapters' merged matrices come from CPU memory.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

BUFFER = 256 << 20
"""Bytes of the buffer, or as many as the largest weight has."""

Named = tuple[str, Tensor]


@runtime_checkable
class HoldsWeights(Protocol):
    """A `Learner` with the student's weights in this process, as the embedded engine."""

    device: torch.device
    """Where they are."""

    def weights(self) -> Iterable[Named]:
        """The current weights, not copies, with the names, shapes and dtypes that `Learner.publish` writes."""
        ...


def gpus() -> dict[str, torch.device]:
    """This process's GPUs, by the ids that vLLM names them by."""
    devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    return {str(torch.cuda.get_device_properties(device).uuid): device for device in devices}


def send(weights: Iterable[Named], to: Mapping[str, torch.device], call: Callable[[Mapping[str, Any]], Any]) -> None:
    """Replace vLLM's weights.

    Args:
        weights: all of them, with the names of the model's folder.
        to: vLLM's GPUs.
        call: sends a request to vLLM's process and waits for the answer.

    Raises:
        RuntimeError: also `EngineFailedError`; vLLM's weights may then be partly old and partly new.
    """
    call({"start": True})
    _send_parts(list(weights), to, call)
    call({"finish": True})
    if torch.cuda.is_initialized():
        torch.cuda.ipc_collect()  # the buffers, which vLLM has closed now
        torch.cuda.empty_cache()
    call({"resume": True})


def _send_parts(weights: list[Named], to: Mapping[str, torch.device], call: Callable[[Mapping[str, Any]], Any]) -> None:
    size = max(BUFFER, *(weight.nbytes for _, weight in weights))
    buffers, handles = {}, {}
    for gpu, device in to.items():
        buffers[gpu], handles[gpu] = allocate(size, device)
    for part in chunks(weights, size):
        begin = 0
        for _, weight in part:
            flat = weight.detach().contiguous().view(-1).view(torch.uint8)
            for buffer in buffers.values():
                buffer[begin : begin + len(flat)].copy_(flat)
            begin += len(flat)
        for device in {weight.device for _, weight in part} | {*to.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # vLLM reads on another stream
        update = {
            "names": [name for name, _ in part],
            "dtype_names": [str(weight.dtype).removeprefix("torch.") for _, weight in part],
            "shapes": [list(weight.shape) for _, weight in part],
            "tensor_sizes": [weight.nbytes for _, weight in part],
            "ipc_handles": handles,
        }
        call({"chunk": base64.b64encode(pickle.dumps(update)).decode()})


def allocate(size: int, device: torch.device) -> tuple[Tensor, tuple[Any, ...]]:
    """A buffer of `size` bytes, and the arguments with which another process opens it."""
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer, reduce_tensor(buffer)[1]


def chunks(weights: Iterable[Named], size: int) -> Iterator[list[Named]]:
    """Cut `weights` into pieces of at most `size` bytes, each of one dtype, so that none is misaligned."""
    part: list[Named] = []
    for name, weight in weights:
        if part and (weight.dtype != part[0][1].dtype or sum(w.nbytes for _, w in part) + weight.nbytes > size):
            yield part
            part = []
        part.append((name, weight))
    if part:
        yield part
