"""Steps of fixed shape as CUDA graphs: captured once, then replayed as one launch."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Records what a step does on the device, without doing it, and returns a function that does it."""

MOST_GRAPHS = 64
"""The least recently used graph is dropped beyond this number."""


class WaitsForDeviceError(RuntimeError):
    """An operation needs a value that the device has not computed yet."""


class NoWaiting(TorchDispatchMode):
    """Raises `WaitsForDeviceError` for operations that make the host wait for the device.

    They can't be captured, and in torch 2.11 a capture that fails leaves the allocator in a state that later asserts
    (pytorch#180395), so they have to be found before. Unlike torch's own check for synchronisation, this one sees the
    present thread only, and works on a CPU.
    """

    WAITING = frozenset(
        ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount")
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode composite operations arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func.overloadpacket.__name__
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for arg in args
            if isinstance(arg, list | tuple)
            for index in arg
        )
        copies = name in ("_to_copy", "copy_")  # elsewhere a scalar of the CPU becomes an argument of the kernel
        devices = {x.device.type for x in tensors if x.ndim or copies}
        if copies and kwargs.get("device"):
            devices.add(torch.device(kwargs["device"]).type)
        if name in self.WAITING or by_mask or (name == "repeat_interleave" and len(tensors) == 1) or len(devices) > 1:
            raise WaitsForDeviceError(f"it waits for the device in {func}")
        return func(*args, **kwargs)


class CudaCapture:
    """Captures into CUDA graphs that share one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        # Not `torch.cuda.graph`, which collects garbage and empties torch's cache each time: a second in a large
        # process. Garbage must not be collected meanwhile either, as it may free tensors of the device.
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(self._memory, "thread_local")  # other threads may use the device
                try:
                    step()
                except BaseException:
                    self._abandon(graph)
                    raise
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        current.wait_stream(self._stream)
        return graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that has failed."""
        with suppress(Exception):
            graph.capture_end()
            return
        with suppress(Exception):  # torch before 2.12 leaves the allocator recording (pytorch#180395)
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._memory)


class GraphedSteps:
    """Runs steps by their graphs.

    The first use of a key runs the step itself, which loads its kernels, the first of a kind under `NoWaiting`; the
    second captures it. If a step can't be captured (it waits for the device, or memory is short), all steps are run
    directly from then on, with one warning.

    Args:
        new_capture: makes a `Capture` with memory of its own.
        most: graphs to keep.
    """

    def __init__(self, new_capture: Callable[[], Capture], most: int = MOST_GRAPHS) -> None:
        self._new_capture, self._most = new_capture, most
        self._capture: Capture | None = None
        self._graphs: dict[Hashable, Step] = {}  # least recently used first
        self._warm: set[Hashable] = set()
        self._checked: set[str] = set()  # kinds
        self.failed = False

    def run(self, kind: str, shape: Hashable, step: Step) -> None:
        """Run `step`, which must do the same for the same kind and shape until `clear`, in fixed memory.

        A step that waits for the device is broken off there and run again, so it must not change what it reads before.
        """
        key = (kind, shape)
        graph = self._graphs.pop(key, None)
        if graph is None and not self.failed:
            if key in self._warm:
                graph = self._try_capture(step)
            elif self._runs(kind, step):
                self._warm.add(key)
                return
        if graph is None:
            step()
            return
        self._graphs[key] = graph
        if len(self._graphs) > self._most:
            del self._graphs[next(iter(self._graphs))]
        graph()

    def _runs(self, kind: str, step: Step) -> bool:
        """Run a step for the first time; False if it was broken off."""
        try:
            with nullcontext() if kind in self._checked else NoWaiting():
                step()
        except WaitsForDeviceError as error:
            self._give_up(error)
            return False
        self._checked.add(kind)
        return True

    def _try_capture(self, step: Step) -> Step | None:
        try:
            if self._capture is None:
                self._capture = self._new_capture()
            return self._capture(step)
        except Exception as error:  # a model's code can do anything
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        self.clear()
        log.warning(
            "decoding runs without CUDA graphs, which is slower: a step can't be captured (%s). engine.decode=plain "
            "silences this",
            str(error).split("\n")[0] or type(error).__name__,
        )

    def clear(self) -> None:
        """Drop all graphs: memory that they use is about to be freed."""
        self._graphs.clear()
        self._capture = None  # its memory pool ends with its last graph
