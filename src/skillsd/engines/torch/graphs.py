"""Steps of fixed shape as CUDA graphs: captured once, then replayed as one launch."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable
from contextlib import suppress

import torch

log = logging.getLogger(__name__)

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Records what a step does on the device, without doing it, and returns a function that does it."""

MOST_GRAPHS = 64
"""The least recently used graph is dropped beyond this number."""


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
                    with suppress(Exception):  # the capture is invalid already
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        current.wait_stream(self._stream)
        return graph.replay


class GraphedSteps:
    """Runs steps by their graphs.

    The first use of a key runs the step itself, which loads its kernels; the second captures it. If a step can't be
    captured (it waits for the device, or memory is short), all steps are run directly from then on, with one warning.

    Args:
        new_capture: makes a `Capture` with memory of its own.
        most: graphs to keep.
    """

    def __init__(self, new_capture: Callable[[], Capture], most: int = MOST_GRAPHS) -> None:
        self._new_capture, self._most = new_capture, most
        self._capture: Capture | None = None
        self._graphs: dict[Hashable, Step] = {}  # least recently used first
        self._warm: set[Hashable] = set()
        self.failed = False

    def run(self, key: Hashable, step: Step) -> None:
        """Run `step`, which must do the same for the same key until `clear`, in fixed memory."""
        graph = self._graphs.pop(key, None)
        if graph is None and key in self._warm and not self.failed:
            graph = self._try_capture(step)
        if graph is None:
            self._warm.add(key)
            step()
            return
        self._graphs[key] = graph
        if len(self._graphs) > self._most:
            del self._graphs[next(iter(self._graphs))]
        graph()

    def _try_capture(self, step: Step) -> Step | None:
        try:
            if self._capture is None:
                self._capture = self._new_capture()
            return self._capture(step)
        except Exception as error:  # a model's code can do anything
            self.failed = True
            self.clear()
            reason = str(error).split("\n")[0] or type(error).__name__
            log.warning(
                "decoding runs without CUDA graphs, which is slower: the step can't be captured (%s). To silence this, "
                "set engine.decode=plain",
                reason,
            )
            return None

    def clear(self) -> None:
        """Drop all graphs: memory that they use is about to be freed."""
        self._graphs.clear()
        self._capture = None  # its memory pool ends with its last graph
