"""How vLLM's process is run."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from skillsd.options import Options


class VllmSettings(Options):
    """The keys of the section ``engine`` that concern vLLM itself."""

    python: str | None = None
    """Path of the interpreter that has vLLM (``build/vllm/bin/python`` after `make vllm-env`). Default: this one."""
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Share of the GPU's memory that vLLM reserves; training needs the rest."""
    cpu_kv_cache_gib: int = Field(1, ge=1)
    """Memory for keys and values when vLLM runs on a CPU."""
    max_model_len: int | None = Field(None, ge=2)
    """The most tokens of a sequence that is sampled. Default: what the recipe's episodes may take. docs/vllm.md."""
    timeout_seconds: float = Field(600.0, gt=0)
    """The longest that vLLM may take to start, to load weights, or to answer one request."""
    options: dict[str, Any] = Field(default_factory=dict)
    """More keyword arguments of ``vllm.LLM``, e.g. ``{tensor_parallel_size: 2}``."""
