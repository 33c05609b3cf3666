"""How vLLM's process is run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from skillsd.errors import UserError
from skillsd.options import Options


class VllmSettings(Options):
    """The keys of the section ``engine`` that concern vLLM itself."""

    python: str | None = None
    """Path of the interpreter that has vLLM (``build/vllm/bin/python`` after `make vllm-env`). Default: this one."""
    replicas: int = Field(1, ge=1)
    """Number of vLLM processes that share the episodes out."""
    gpus: list[int] | None = Field(None, min_length=1)
    """The GPUs that vLLM runs on, by the learner's numbers, e.g. ``[1]``; several replicas get equal parts, in order.
    Default: one replica shares the learner's; of several, each gets a GPU, the learner's last."""
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
    logprob_tolerance: float = Field(0.25, gt=0)
    """The largest mean difference between vLLM's and the learner's log-probs of the first sampled tokens after each
    update. A larger one ends the run: vLLM has other weights."""
    options: dict[str, Any] = Field(default_factory=dict)
    """More keyword arguments of ``vllm.LLM``, e.g. ``{enforce_eager: true}``."""

    def of_replica(self, number: int, device: str, visible: int) -> VllmSettings:
        """The settings of one replica, with the learner on `device` and `visible` GPUs in this process.

        Raises:
            UserError: if the GPUs do not suffice, or can't be shared out equally.
        """
        kind, _, index = device.partition(":")
        gpus = self.gpus
        if gpus is None:
            if self.replicas == 1 or kind != "cuda":
                return self
            first = int(index or 0)
            gpus = [*(gpu for gpu in range(visible) if gpu != first), first][: self.replicas]
            if len(gpus) < self.replicas:
                raise UserError(
                    f"engine.replicas is {self.replicas}, but this process sees {visible} GPUs: at most one replica a "
                    "GPU; lower engine.replicas"
                )
        if not 0 <= min(gpus) <= max(gpus) < visible:
            raise UserError(f"engine.gpus is {gpus}, but this process sees {visible} GPUs, counted from 0")
        if len(gpus) % self.replicas or len(set(gpus)) < len(gpus):
            raise UserError(
                f"engine.gpus is {gpus}, which can't be shared out among {self.replicas} replicas (engine.replicas): "
                "name each GPU once, the same number for each replica"
            )
        each = len(gpus) // self.replicas
        return self.model_copy(update={"gpus": gpus[number * each : (number + 1) * each]})

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
