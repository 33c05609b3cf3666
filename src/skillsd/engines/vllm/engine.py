"""Rollouts by vLLM, training by the embedded engine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from skillsd.engines.base import (
    Engine,
    LossFunction,
    Sample,
    SampleRequest,
    StepReport,
    TokenSequence,
    TopK,
    TrainItem,
    Weights,
)
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.vllm.client import WorkerClient, WorkerError
from skillsd.errors import UserError
from skillsd.metrics import Mean


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is run.

    Attributes:
        python: the interpreter that has vLLM; None is the one that runs this.
        gpu_memory_utilization: share of the GPU's memory that vLLM takes; the training needs the rest.
        cpu_kv_cache_gib: memory for keys and values on a CPU.
        max_model_len: the most tokens of a sequence that is sampled here; None is what the trainer takes. Without room
            for the keys and values of one that long vLLM does not start.
        max_requests: the most that are decoded at once.
        timeout_seconds: the longest that vLLM may take to start, to load weights, or to answer one request.
        options: more of ``vllm.LLM``'s keyword arguments, by name.
    """

    python: str | None = None
    gpu_memory_utilization: float = 0.4
    cpu_kv_cache_gib: int = 1
    max_model_len: int | None = None
    max_requests: int = 256
    timeout_seconds: float = 600.0
    options: dict[str, Any] = field(default_factory=dict)


class VllmEngine(Engine):
    """Samples the student from vLLM, in a process of its own; all else is a `TorchEngine`'s.

    After an update vLLM takes the new weights in place before it samples again, and forgets its prefix cache. Its
    weights come from a folder (in memory where there is ``/dev/shm``), always with an output head of its own: a head
    that is tied to the embeddings is not renewed by vLLM's CPU build, without a word.

    A request for the teacher is sampled by the trainer. Sessions only check what the contract wants checked: vLLM finds
    a common prefix in its cache by itself.

    `max_length` is the trainer's: what is scored or learnt may be longer than what vLLM is asked to sample.

    Args:
        trainer: scores and learns. It gives the weights, each in its own dtype, adapters merged into them.

    Raises:
        UserError: if vLLM can't be started, or not in time, or there is no room for the weights.
    """

    def __init__(self, trainer: TorchEngine, options: VllmOptions | None = None) -> None:
        self.trainer = trainer
        self.options = options or VllmOptions()
        self.tokenizer, self.stop_tokens = trainer.tokenizer, trainer.stop_tokens
        self.device = trainer.device
        self.max_length = trainer.max_length
        self._sampled_length = min(trainer.max_length, self.options.max_model_len or trainer.max_length)
        self._stale = False  # what vLLM holds, beside the trainer's student
        self._held: dict[str, tuple[int, ...]] = {}  # each session's tokens
        self.seconds_reloading = 0.0
        self._folder = Path(tempfile.mkdtemp(prefix="skillsd-vllm-", dir=_in_memory(trainer.model)))
        self._close: Any = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        try:
            export_weights(trainer.model, self._folder)
            self._worker = WorkerClient(self.options.python or sys.executable, self._llm_options(), self._environment())
            self._close = weakref.finalize(self, self._worker.close)
            self.version = str(self._wait(self._worker.ready, "has not started"))
        except BaseException as error:
            self.close()
            if isinstance(error, WorkerError):
                raise UserError(str(error)) from None
            raise

    def close(self) -> None:
        """End vLLM's process and give its memory back."""
        self._close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- sampling -----------------------------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Sample:
        if request.weights == "teacher":
            return await self.trainer.sample(request)
        self._check(request)
        if self._stale:
            self._give_weights()
        number, answer = self._worker.ask({"tokens": request.tokens, "parameters": self._parameters(request)})
        try:
            found = await asyncio.wait_for(asyncio.wrap_future(answer), self.options.timeout_seconds)
        except TimeoutError:
            raise WorkerError(
                f"vLLM gave no answer within {self.options.timeout_seconds:g} s (engine.timeout_seconds)"
            ) from None
        finally:
            self._worker.abort(number)  # if it is still under way, nobody waits for it
        sample = Sample(tuple(found["tokens"]), tuple(found["logprobs"]), found["stop"])
        if request.session is not None:
            self._held[request.session] = (*request.tokens, *sample.tokens)
        return sample

    def end_session(self, session: str) -> None:
        self._held.pop(session, None)
        self.trainer.end_session(session)

    def _check(self, request: SampleRequest) -> None:
        if not request.tokens or request.max_tokens < 1:
            raise ValueError(
                f"{len(request.tokens)} tokens to continue and {request.max_tokens} asked for: each must be at least "
                "one token"
            )
        needed = len(request.tokens) + request.max_tokens
        if needed > self._sampled_length:
            raise ValueError(
                f"{needed} tokens are asked of vLLM, which was started for at most {self._sampled_length} "
                f"(engine.max_model_len); the model takes {self.max_length}"
            )
        held = self._held.get(request.session or "", ())
        if request.tokens[: len(held)] != held:
            raise ValueError(
                f"the request does not extend its session {request.session!r}: token-in, token-out is broken"
            )

    def _parameters(self, request: SampleRequest) -> dict[str, Any]:
        """vLLM's own defaults cut nothing off (no top-k, top-p or penalties); the stops are ours, not the model's."""
        return {
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": request.seed % (1 << 63),
            "stop_token_ids": sorted(self.stop_tokens),
            "ignore_eos": True,
        }

    # -- vLLM's process -----------------------------------------------------------------------------------------

    def _llm_options(self) -> dict[str, Any]:
        return {
            "model": str(self._folder),
            "skip_tokenizer_init": True,  # ids go in, ids come out
            "dtype": str(self.trainer.model.dtype).removeprefix("torch."),
            "max_model_len": self._sampled_length,
            "max_num_seqs": self.options.max_requests,
            "gpu_memory_utilization": self.options.gpu_memory_utilization,
            "logprobs_mode": "processed_logprobs",  # of the sampling distribution, temperature and all
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            **self.options.options,
        }

    def _environment(self) -> dict[str, str]:
        cpu = {
            "VLLM_CPU_KVCACHE_SPACE": str(self.options.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it wants cores of its own
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        return {**cpu, **kept}

    def _give_weights(self) -> None:
        begin = time.perf_counter()
        export_weights(self.trainer.model, self._folder)
        _, answer = self._worker.ask({"weights": str(self._folder)})
        self._wait(answer, "has not loaded the new weights")
        self._stale = False
        self.seconds_reloading += time.perf_counter() - begin

    def _wait(self, future: Future[Any], what: str) -> Any:
        """Block: nothing can be sampled meanwhile."""
        try:
            return future.result(self.options.timeout_seconds)
        except TimeoutError:
            raise WorkerError(
                f"vLLM {what} within {self.options.timeout_seconds:g} s (engine.timeout_seconds). Its last words:\n"
                f"{self._worker.last_words()}"
            ) from None

    # -- the trainer's ------------------------------------------------------------------------------------------

    def score(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
        distribution: bool = False,
    ) -> list[Tensor]:
        return self.trainer.score(sequences, weights, temperature=temperature, distribution=distribution)

    def score_top_k(
        self, sequences: Sequence[TokenSequence], k: int, weights: Weights = "student", *, temperature: float = 1.0
    ) -> list[TopK]:
        return self.trainer.score_top_k(sequences, k, weights, temperature=temperature)

    def forward_backward(
        self,
        batch: Sequence[TrainItem],
        loss: LossFunction,
        *,
        temperature: float = 1.0,
        distribution: bool = False,
    ) -> dict[str, Mean]:
        return self.trainer.forward_backward(batch, loss, temperature=temperature, distribution=distribution)

    def step(self, learning_rate: float) -> StepReport:
        report = self.trainer.step(learning_rate)
        if report.applied:
            self._stale = True
            self._held.clear()
        return report

    def sync_teacher(self, rate: float = 1.0) -> None:
        self.trainer.sync_teacher(rate)

    def save(self, folder: Path) -> None:
        self.trainer.save(folder)

    def load(self, folder: Path) -> None:
        self._stale = True
        self._held.clear()
        self.trainer.load(folder)


def _plain(model: nn.Module) -> nn.Module:
    """The model beneath its adapters."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def _size(model: nn.Module) -> int:
    """Bytes that `export_weights` writes, at most: the output head has a place of its own, tied or not."""
    plain: Any = _plain(model)
    return sum(w.numel() * w.element_size() for w in [*model.parameters(), plain.get_output_embeddings().weight])


def _in_memory(model: nn.Module) -> str | None:
    """A file system in memory that holds the weights; None if there is none."""
    memory = "/dev/shm"
    room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1.1 * _size(model)
    return memory if room else None


def export_weights(model: nn.Module, folder: Path) -> None:
    """Write `model` as vLLM shall read it: adapters merged, and the output head tied to nothing.

    Raises:
        UserError: if they can't be written.
    """
    try:
        _write(_plain(model), folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"can't write the weights for vLLM ({_size(model) / 2**30:.2f} GiB) into {str(folder)!r}: {error}. Make "
            "room there, or set TMPDIR to a folder that has it (taken where /dev/shm is too small)"
        ) from error


def _write(plain: Any, folder: Path) -> None:
    for old in folder.glob("*.safetensors"):  # else it would stay until the new one is whole: twice the room
        old.unlink()
    merged = _merged(plain)
    head = plain.get_output_embeddings()
    own = {}
    if head.weight is plain.get_input_embeddings().weight:
        name = next(name for name, module in plain.named_modules() if module is head)
        own = {f"{name}.weight": merged.pop(f"{name}.weight").detach()}  # its adapter, if any, is not the embeddings'
    plain.save_pretrained(folder, state_dict=merged, max_shard_size="10TB")
    if own:
        save_file(own, folder / "head.safetensors")
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")


def _merged(plain: nn.Module) -> dict[str, Tensor]:
    """The weights by the names and in the dtypes that they have without adapters. What is trained stays as it is.

    What is merged lies in the CPU's memory and is made one matrix at a time: adapters are float32, so their sum with
    anything is.
    """
    weights = {_unwrapped(name): weight for name, weight in plain.state_dict().items() if ".lora_" not in name}
    for name, module in plain.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        # An adapter of a bare parameter (experts have some) says which; those of one module are wrapped in each other.
        key = f"{_unwrapped(name)}.{getattr(module, 'parameter_name', 'weight')}"
        with torch.no_grad():
            for adapter in module.active_adapters:
                delta = module.get_delta_weight(adapter)
                weights[key] = (weights[key].to(delta.device) + delta).to(weights[key].dtype).cpu()
    return weights


def _unwrapped(name: str) -> str:
    """What a module or weight is called without peft's wrappers."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
