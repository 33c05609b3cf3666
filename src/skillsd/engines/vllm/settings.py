"""How vLLM's process is run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from skillsd.options import Options


class VllmSettings(Options):
    """The keys of the section ``engine`` that concern vLLM itself."""

    python: str | None = None
    """Path of the interpreter that has vLLM (``build/vllm/bin/python`` after `make vllm-env`). Default: this one."""
    gpus: list[int] | None = Field(None, min_length=1)
    """The GPUs that vLLM runs on, by the learner's numbers, e.g. ``[1]``. Default: it shares the learner's."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory that vLLM reserves. Default: 0.4 of the learner's GPU, 0.9 of one of its own."""
    weights: Literal["auto", "ipc", "file"] = "auto"
    """How new weights reach vLLM: ``ipc``: in GPU memory, by vLLM's weight-transfer interface; ``file``: in a folder;
    ``auto``: ``ipc`` if the learner is on a GPU."""
    sleep: bool | Literal["auto"] = "auto"
    """Free vLLM's GPU memory while the learner scores and trains. ``auto``: if they share a GPU."""
    cpu_kv_cache_gib: int = Field(1, ge=1)
    """Memory for keys and values when vLLM runs on a CPU."""
    max_model_len: int | None = Field(None, ge=2)
    """The most tokens of a sequence that is sampled. Default: what the recipe's episodes may take. docs/vllm.md."""
    timeout_seconds: float = Field(600.0, gt=0)
    """The longest that vLLM may take to start, to load weights, or to answer one request."""
    options: dict[str, Any] = Field(default_factory=dict)
    """More keyword arguments of ``vllm.LLM``, e.g. ``{enforce_eager: true}``."""

    def shares(self, device: str) -> bool:
        """Whether vLLM runs on the learner's `device`, a GPU such as ``cuda:0``."""
        kind, _, index = device.partition(":")
        return kind == "cuda" and (self.gpus is None or int(index or 0) in self.gpus)

    def sleeps(self, device: str) -> bool:
        """Whether vLLM sleeps while the learner on `device` works."""
        return self.shares(device) if self.sleep == "auto" else self.sleep

    def reserved_share(self, device: str) -> float:
        """Share of a GPU's memory that vLLM reserves, with the learner on `device`."""
        return self.gpu_memory_utilization or (0.9 if self.gpus and not self.shares(device) else 0.4)
