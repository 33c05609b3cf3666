"""Rollouts by vLLM, with the weights of any learner."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
from safetensors import safe_open

from skillsd.engines.base import Learner, Sample, Sampler, SampleRequest, WeightsHandle, check_request
from skillsd.engines.torch.ranks import launched
from skillsd.engines.vllm import transfer
from skillsd.engines.vllm.client import WorkerClient
from skillsd.engines.vllm.settings import VllmSettings
from skillsd.engines.weights_folder import weights_folder
from skillsd.errors import EngineFailedError, SamplerLostError, UserError

log = logging.getLogger(__name__)


class VllmSampler(Sampler):
    """Samples the student with vLLM, in a separate process.

    The process starts with the first published weights, from a folder, in ``/dev/shm`` if that is large enough. Later
    ones are loaded in place, which empties its prefix cache: from that folder, or out of GPU memory
    (`skillsd.engines.vllm.transfer`). If that fails half way, the process is ended, so that mixed weights never sample;
    the next call of `load` starts another.

    Requests for the teacher are refused: see `skillsd.engines.base.Engine.sampler_of`. Sessions are only checked, not
    cached: vLLM's prefix cache finds common prefixes by itself, such as a session's earlier turns.

    Args:
        learner: publishes the weights.
        max_length: the most tokens of a sequence; None is what the learner takes. vLLM does not start without memory
            for the KV cache of one such sequence.
        at_once: the most requests that are decoded together.

    Raises:
        UserError: if an option does not fit the machine or the learner.
    """

    def __init__(self, learner: Learner, options: VllmSettings, *, max_length: int | None = None, at_once: int) -> None:
        self.options = options
        self._holder = learner if isinstance(learner, transfer.HoldsWeights) else None
        self._device = str(self._holder.device) if self._holder else "elsewhere"
        self._by_ipc = options.weights != "file" and self._device.startswith("cuda")
        self._sleeps = options.sleeps(self._device)
        self._check_options()
        self._stop_tokens = learner.stop_tokens
        self._model_length = learner.max_length
        self.max_length = min(learner.max_length, max_length or learner.max_length)
        self._at_once = at_once
        self._worker: WorkerClient | None = None
        self._gpus: Mapping[str, torch.device] = {}  # vLLM's, if weights are handed over in memory
        self._version = 0
        self._refusal = "vLLM has no weights yet: call Engine.publish() first"  # why nothing can be sampled, if not ""
        self._asleep = False
        self._prompt_tokens = self._cached_tokens = 0  # since the last call of `metrics`
        self._held: dict[str, tuple[int, ...]] = {}  # each session's tokens
        self.seconds_reloading = 0.0
        self._folder = weights_folder(learner.published_bytes)
        self.inbox = self._folder  # None while weights are handed over in memory
        self._close: Any = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def _check_options(self) -> None:
        options = self.options
        if options.weights == "ipc" and not self._by_ipc:
            raise UserError(
                "engine.weights=ipc hands over weights in GPU memory, but the learner's are not on a GPU of this "
                "process: leave engine.weights out"
            )
        if self._sleeps and not self._device.startswith("cuda"):
            raise UserError("engine.sleep=true frees GPU memory, but the learner is not on a GPU: leave it out")

    def close(self) -> None:
        self._close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- sampling -----------------------------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Sample:
        if request.weights != "student":
            raise ValueError(
                "vLLM has only the student's weights: sample from the teacher with Engine.sampler_of('teacher')"
            )
        self._check(request)
        while self._asleep:  # new weights come with the next `load`
            await asyncio.sleep(0.05)
        if self._refusal or self._worker is None:
            raise EngineFailedError(self._refusal)
        worker, held = self._worker, self._held.get(request.session or "", ())
        message: dict[str, Any] = {"tokens": request.tokens[len(held) :], "parameters": self._parameters(request)}
        if request.session is not None:  # the worker has the rest of the session
            message |= {"session": request.session, "keep": len(held)}
        number, answer = worker.ask(message)
        try:
            found = await self._answer(answer)
        finally:
            worker.abort(number)  # if it is still under way: cancelled or timed out
        self._prompt_tokens += len(request.tokens)
        self._cached_tokens += found.get("cached", 0)
        sample = Sample(tuple(found["tokens"]), tuple(found["logprobs"]), found["stop"], self._version)
        if request.session is not None:
            self._held[request.session] = (*request.tokens, *sample.tokens)
        return sample

    def end_session(self, session: str) -> None:
        self._held.pop(session, None)
        if self._worker is not None:
            self._worker.tell({"end": session})

    async def _answer(self, future: Future[dict[str, Any]]) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.options.timeout_seconds)
        except TimeoutError:
            raise SamplerLostError(
                f"vLLM gave no answer within {self.options.timeout_seconds:g} s (engine.timeout_seconds)"
            ) from None

    def metrics(self) -> dict[str, float]:
        share = self._cached_tokens / self._prompt_tokens if self._prompt_tokens else None
        self._prompt_tokens = self._cached_tokens = 0
        return {} if share is None else {"rollout/cached_prompt_tokens": share}

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

    async def sleep(self) -> None:
        if self._sleeps and self._worker is not None:
            self._asleep = True
            await self._answer(self._worker.ask({"sleep": True})[1])

    async def load(self, weights: WeightsHandle) -> None:
        """Load published weights. Blocks the event loop, so nothing is sampled meanwhile."""
        if weights.location != (self.inbox and str(self.inbox)):
            raise ValueError(f"vLLM loads weights only from its inbox, {str(self.inbox)!r}; got {weights}")
        if weights.version == self._version and not self._refusal and not self._asleep:
            return
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()  # memory that vLLM may need
        if self._worker is None:
            self._start()
        else:
            self._update(weights.version)
        self._version, self._refusal, self._asleep = weights.version, "", False
        self._held.clear()

    def _update(self, version: int) -> None:
        begin = time.perf_counter()
        self._refusal = "the last update of vLLM's weights was interrupted: call Engine.publish() first"
        complete = False
        try:
            if self._holder and self.inbox is None:
                transfer.send(self._holder.weights(), self._gpus, self._call)
            else:
                self._call({"weights": str(self._folder)})
            complete = True
        except (RuntimeError, OSError) as error:  # of the worker, or of CUDA in this process
            hint = ". Lower engine.gpu_memory_utilization" if "out of memory" in str(error).lower() else ""
            self._refusal = (
                f"vLLM has not got version {version} of the weights, and its process was ended, as some of its weights "
                f"may be old and some new: {error}{hint}"
            )
            raise EngineFailedError(self._refusal) from error
        finally:
            if not complete:
                self._stop()
        self.seconds_reloading += time.perf_counter() - begin

    def _call(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._worker is not None
        found: dict[str, Any] = self._wait(self._worker.ask(message)[1], "has not loaded the new weights")
        return found

    def _stop(self) -> None:
        """End the process, so that the next `load` starts another one."""
        assert self._worker is not None
        self._worker.close()
        self._worker, self.inbox, self._asleep = None, self._folder, False
        self._folder.mkdir(exist_ok=True)  # the process has removed it

    def _start(self) -> None:
        in_memory = self._by_ipc and self._names_agree()
        python = self.options.python or sys.executable
        self._worker = WorkerClient(python, self._llm_options(in_memory), self._environment())
        self._close = weakref.finalize(self, self._worker.close)
        try:
            ready = self._wait(self._worker.ready, "has not started")
            self.vllm_version = str(ready["ready"])
            if in_memory:
                self._gpus = _known(ready["gpus"])
        except (EngineFailedError, UserError) as error:
            self.close()
            raise UserError(str(error)) from None
        if in_memory:
            self.inbox = None
            for file in self._folder.glob("*.safetensors"):  # they take memory, and are not read again
                file.unlink()

    def _names_agree(self) -> bool:
        """Whether the learner's weights have the names and shapes that vLLM reads from the folder."""
        assert self._holder is not None
        written: dict[str, list[int]] = {}
        for path in self._folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                written |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        agree = written == {name: list(weight.shape) for name, weight in self._holder.weights()}
        if not agree:
            what = "this model's weights have other names or shapes in memory than in its folder"
            if self.options.weights == "ipc":
                raise UserError(f"{what}, so engine.weights=ipc can't hand them over: leave it out")
            log.warning("%s: vLLM gets them by files (engine.weights)", what)
        return agree

    def _llm_options(self, in_memory: bool = False) -> dict[str, Any]:
        return {
            "model": str(self._folder),
            "skip_tokenizer_init": True,  # ids go in, ids come out
            "dtype": self._published_dtype(),  # vLLM's default is half precision, even for float32 weights
            "max_model_len": self.max_length,
            "max_num_seqs": self._at_once,
            "gpu_memory_utilization": self.options.reserved_share(self._device),
            "logprobs_mode": "processed_logprobs",  # of the sampling distribution, with temperature
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            **({"tensor_parallel_size": len(self.options.gpus)} if self.options.gpus else {}),
            **({"weight_transfer_config": {"backend": "ipc"}} if in_memory else {}),
            **({"enable_sleep_mode": True} if self._sleeps else {}),
            **self.options.options,
        }

    def _published_dtype(self) -> str:
        config = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        return str(config.get("dtype") or config["torch_dtype"])

    def _environment(self) -> dict[str, str]:
        cpu = {
            "VLLM_CPU_KVCACHE_SPACE": str(self.options.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise it claims cores for itself
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        inherited = launched.without_ranks(os.environ).items()
        kept = {name: value for name, value in inherited if name not in ("PYTHONPATH", "PYTHONHOME")}
        gpus = self.options.gpus
        if gpus is None and self._device.startswith("cuda"):
            gpus = [torch.device(self._device).index or 0]
        if gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            numbers = visible.split(",") if visible else range(max(gpus) + 1)
            kept["CUDA_VISIBLE_DEVICES"] = ",".join(str(numbers[gpu]) for gpu in gpus)
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


def _known(ids: list[str]) -> dict[str, torch.device]:
    """These of this process's GPUs.

    Raises:
        UserError: if one is not among them.
    """
    known = transfer.gpus()
    if unknown := [gpu for gpu in ids if gpu not in known]:
        raise UserError(
            f"vLLM runs on the GPU {unknown[0]!r}, which this process does not see: set engine.weights=file"
        )
    return {gpu: known[gpu] for gpu in ids}
