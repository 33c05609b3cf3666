"""Rollouts by vLLM, with the weights of any learner."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from skillsd.engines.base import Learner, Sample, Sampler, SampleRequest, WeightsHandle, check_request
from skillsd.engines.vllm.client import WorkerClient
from skillsd.engines.vllm.settings import VllmSettings
from skillsd.errors import EngineFailedError, UserError


class VllmSampler(Sampler):
    """Samples the student with vLLM, in a separate process.

    The process starts with the first published weights and loads later ones in place, which empties its prefix cache.
    Weights are handed over in a folder, in ``/dev/shm`` if that is large enough.

    Requests for the teacher are refused: see `skillsd.engines.base.Engine.sampler_of`. Sessions are only checked, not
    cached: vLLM's prefix cache finds common prefixes by itself.

    Args:
        learner: publishes the weights. Only its stop tokens and lengths are used here.
        max_length: the most tokens of a sequence; None is what the learner takes. vLLM does not start without memory
            for the KV cache of one such sequence.
        at_once: the most requests that are decoded together.

    Raises:
        UserError: if the interpreter can't be run.
    """

    def __init__(self, learner: Learner, options: VllmSettings, *, max_length: int | None = None, at_once: int) -> None:
        self.options = options
        self._stop_tokens = learner.stop_tokens
        self._model_length = learner.max_length
        self.max_length = min(learner.max_length, max_length or learner.max_length)
        self._at_once = at_once
        self._worker: WorkerClient | None = None
        self._loaded: WeightsHandle | None = None
        self._held: dict[str, tuple[int, ...]] = {}  # each session's tokens
        self.seconds_reloading = 0.0
        self.inbox = Path(tempfile.mkdtemp(prefix="skillsd-vllm-", dir=_in_memory(learner.published_bytes)))
        self._close: Any = weakref.finalize(self, shutil.rmtree, self.inbox, ignore_errors=True)

    def close(self) -> None:
        self._close()
        assert self.inbox is not None
        shutil.rmtree(self.inbox, ignore_errors=True)

    # -- sampling -----------------------------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Sample:
        if request.weights != "student":
            raise ValueError(
                "vLLM has only the student's weights: sample from the teacher with Engine.sampler_of('teacher')"
            )
        if self._worker is None or self._loaded is None:
            raise RuntimeError("vLLM has no weights yet: call Engine.publish() first")
        self._check(request)
        number, answer = self._worker.ask({"tokens": request.tokens, "parameters": self._parameters(request)})
        try:
            found = await asyncio.wait_for(asyncio.wrap_future(answer), self.options.timeout_seconds)
        except TimeoutError:
            raise EngineFailedError(
                f"vLLM gave no answer within {self.options.timeout_seconds:g} s (engine.timeout_seconds)"
            ) from None
        finally:
            self._worker.abort(number)  # if it is still under way: cancelled or timed out
        sample = Sample(tuple(found["tokens"]), tuple(found["logprobs"]), found["stop"], self._loaded.version)
        if request.session is not None:
            self._held[request.session] = (*request.tokens, *sample.tokens)
        return sample

    def end_session(self, session: str) -> None:
        self._held.pop(session, None)

    def _check(self, request: SampleRequest) -> None:
        needed = len(request.tokens) + request.max_tokens
        if needed > self.max_length:
            raise ValueError(
                f"the request needs {needed} tokens (its own and max_tokens), but vLLM was started for at most "
                f"{self.max_length} (engine.max_model_len); the model takes {self._model_length}"
            )
        check_request(request, self.max_length, self._held.get(request.session or "", ()))

    def _parameters(self, request: SampleRequest) -> dict[str, Any]:
        """vLLM's defaults keep the full distribution: no top-k, top-p or penalties. Stop tokens are the learner's."""
        return {
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": request.seed % (1 << 63),
            "stop_token_ids": sorted(self._stop_tokens),
            "ignore_eos": True,
        }

    # -- vLLM's process -----------------------------------------------------------------------------------------

    async def load(self, weights: WeightsHandle) -> None:
        """Load published weights. Blocks the event loop, so nothing is sampled meanwhile."""
        if weights.location != str(self.inbox):
            raise ValueError(f"vLLM loads weights only from its inbox, {str(self.inbox)!r}; got {weights}")
        if weights == self._loaded:
            return
        if self._worker is None:
            self._start()
        else:
            begin = time.perf_counter()
            _, answer = self._worker.ask({"weights": weights.location})
            self._wait(answer, "has not loaded the new weights")
            self.seconds_reloading += time.perf_counter() - begin
        self._loaded = weights
        self._held.clear()

    def _start(self) -> None:
        self._worker = WorkerClient(self.options.python or sys.executable, self._llm_options(), self._environment())
        self._close = weakref.finalize(self, self._worker.close)
        try:
            self.vllm_version = str(self._wait(self._worker.ready, "has not started"))
        except EngineFailedError as error:
            self.close()
            raise UserError(str(error)) from None

    def _llm_options(self) -> dict[str, Any]:
        return {
            "model": str(self.inbox),
            "skip_tokenizer_init": True,  # ids go in, ids come out
            "dtype": self._published_dtype(),  # vLLM's default is half precision, even for float32 weights
            "max_model_len": self.max_length,
            "max_num_seqs": self._at_once,
            "gpu_memory_utilization": self.options.gpu_memory_utilization,
            "logprobs_mode": "processed_logprobs",  # of the sampling distribution, with temperature
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            **self.options.options,
        }

    def _published_dtype(self) -> str:
        assert self.inbox is not None
        config = json.loads((self.inbox / "config.json").read_text(encoding="utf-8"))
        return str(config.get("dtype") or config["torch_dtype"])

    def _environment(self) -> dict[str, str]:
        cpu = {
            "VLLM_CPU_KVCACHE_SPACE": str(self.options.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise it claims cores for itself
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        return {**cpu, **kept}

    def _wait(self, future: Future[Any], what: str) -> Any:
        assert self._worker is not None
        try:
            return future.result(self.options.timeout_seconds)
        except TimeoutError:
            raise EngineFailedError(
                f"vLLM {what} within {self.options.timeout_seconds:g} s (engine.timeout_seconds). The end of its log:\n"
                f"{self._worker.log_tail()}"
            ) from None


def _in_memory(size: int) -> str | None:
    """``/dev/shm`` if it has room for `size` bytes, else None."""
    memory = "/dev/shm"
    room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1.1 * size
    return memory if room else None
