"""What the worker uses of vLLM 0.32.0's Python API, on the CPU, with faults. Tests copy it to a folder as ``vllm``.

A sample's log-prob is minus the mean of all weights, so it shows which weights sampled it. -999: cached keys and values
of other weights were used. The environment variable FAKE_VLLM names a fault.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import load_file

__version__ = "0.32.0"
FAULT = os.environ.get("FAKE_VLLM", "")
BLOCK = 2
"""Tokens of a block of the prefix cache."""

Tokens = tuple[int, ...]

device = SimpleNamespace(index=0)
cuda = SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(uuid="card"))
sys.modules["torch"] = SimpleNamespace(cuda=cuda)  # type: ignore[assignment]  # the real one takes seconds to import


def said(what: str) -> None:
    print(f"fake: {what}", file=sys.stderr, flush=True)


class SamplingParams(SimpleNamespace):
    """Only keeps what it is given."""


class LLM:
    """Weights, a prefix cache, and what is awake of the two."""

    def __init__(self, model: str, **options: Any) -> None:
        said(f"options {options}")
        self.options, self.llm_engine = options, self
        self.awake = {"weights", "kv_cache"}
        self.updating, self.packed, self.chunks = False, False, 0
        self.waiting: dict[str, tuple[Tokens, SamplingParams]] = {}
        self.cache: dict[Tokens, float] = {}  # a prefix of whole blocks -> mean of the weights that computed it
        self._read(model)

    def _read(self, folder: str) -> None:
        self.weights: dict[str, np.ndarray] = {}
        for path in Path(folder).glob("*.safetensors"):
            self.weights |= load_file(path)

    @property
    def mean(self) -> float:
        return float(np.concatenate([weight.ravel() for weight in self.weights.values()]).mean())

    def collective_rpc(self, method: str | Callable[[Any], Any], kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        if callable(method):
            return [method(SimpleNamespace(device=device))]
        assert method == "reload_weights"
        said("reload_weights")
        assert "weights" in self.awake
        if FAULT == "reload":
            raise OSError("disk error")
        self._read((kwargs or {})["weights_path"])
        return [None]

    # -- requests ---

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        assert self.awake == {"weights", "kv_cache"}
        assert not self.updating
        self.waiting[request_id] = (tuple(prompt["prompt_token_ids"]), params)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def abort_request(self, ids: list[str]) -> None:
        for name in ids:
            self.waiting.pop(name, None)

    def step(self) -> list[Any]:
        done, self.waiting = self.waiting, {}
        return [self._sample(name, tokens) for name, (tokens, _) in done.items()]

    def _sample(self, name: str, tokens: Tokens) -> Any:
        blocks = [tokens[:n] for n in range(BLOCK, len(tokens), BLOCK)]
        found = [self.cache[block] for block in blocks if block in self.cache]
        logprob = -self.mean if all(mean == self.mean for mean in found) else -999.0
        self.cache |= dict.fromkeys([*blocks, tokens], self.mean)
        output = SimpleNamespace(
            finish_reason="length", token_ids=[7], logprobs=[{7: SimpleNamespace(logprob=logprob)}]
        )
        return SimpleNamespace(finished=True, request_id=name, outputs=[output], num_cached_tokens=BLOCK * len(found))

    def reset_prefix_cache(self) -> bool:
        said("reset_prefix_cache")
        self.cache.clear()
        return True

    # -- memory and weights ---

    def sleep(self, level: int = 1) -> None:
        said(f"sleep {level}")
        assert self.options["enable_sleep_mode"]
        assert not self.waiting
        self.awake.clear()
        self.cache.clear()

    def wake_up(self, tags: list[str]) -> bool:
        said(f"wake_up {tags}")
        if FAULT == "memory" and "kv_cache" in tags:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:119")
        self.awake |= set(tags)
        return len(self.awake) == 2

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        assert self.options["weight_transfer_config"] == {"backend": "ipc"}
        self.packed = request["init_info"] == {"packed": True}

    def start_weight_update(self) -> None:
        said("start")
        assert "weights" in self.awake
        assert self.packed
        assert not self.updating
        self.updating = True

    def update_weights(self, request: dict[str, Any]) -> None:
        said("chunk")
        assert self.updating
        update, self.chunks = request["update_info"], self.chunks + 1
        if self.chunks % 2 == 0 and FAULT == "chunk":
            self.updating = False
            raise ValueError("IPC handle not found")
        if self.chunks % 2 == 0 and FAULT == "death":
            os._exit(3)
        _, path, size = update["ipc_handles"]["card"]
        rest = Path(path).read_bytes()
        assert len(rest) == size
        described = (update[key] for key in ("names", "dtype_names", "shapes", "tensor_sizes"))
        for name, dtype, shape, count in zip(*described, strict=True):
            self.weights[name][:] = np.frombuffer(rest[:count], dtype).reshape(shape)
            rest = rest[count:]

    def finish_weight_update(self) -> None:
        said("finish")
        assert self.updating
        self.updating = False


if FAULT.startswith("no "):
    delattr(LLM, FAULT.removeprefix("no "))
