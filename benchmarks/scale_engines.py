"""Engines for `scale.py`: one without a model, and a stand-in for vLLM that decodes with the embedded engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from skillsd.engines.base import (
    Learner,
    Loss,
    Sample,
    Sampler,
    SampleRequest,
    StepReport,
    TokenSequence,
    TrainItem,
    Weights,
    WeightsHandle,
)
from skillsd.engines.tinker import model as files
from skillsd.engines.torch.engine import TorchEngine
from skillsd.metrics import Metrics
from skillsd.objective.logprobs import CHOSEN, TokenLogprobs, Want

MODEL = "nano"
MOVES = ("Up", "Down", "Left", "Right")


class Simulated(Learner, Sampler):
    """Samples moves at random, gives every token the same log-prob, and never learns."""

    def __init__(self) -> None:
        self.tokenizer, self.stop_tokens, self.max_length = files.read(MODEL)
        self.version = 0
        moves = [self.tokenizer.encode(f" {move}", add_special_tokens=False) for move in MOVES]
        self._turns = [(*move, min(self.stop_tokens)) for move in moves]

    async def sample(self, request: SampleRequest) -> Sample:
        await asyncio.sleep(0)
        tokens = random.Random(request.seed).choice(self._turns)[: request.max_tokens]
        return Sample(tokens, (-1.0,) * len(tokens), "stop", self.version)

    async def logprobs(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
        want: Want = CHOSEN,
    ) -> list[TokenLogprobs]:
        return [TokenLogprobs(torch.full((sequence.marked,), -1.0)) for sequence in sequences]

    async def forward_backward(self, batch: Sequence[TrainItem], loss: Loss, *, temperature: float = 1.0) -> Metrics:
        signals = {name: torch.cat([item.signals[name] for item in batch]) for name in batch[0].signals}
        return loss(TokenLogprobs(torch.full((sum(item.sequence.marked for item in batch),), -1.0)), signals)[1]

    async def step(self, learning_rate: float) -> StepReport:
        self.version += 1
        return StepReport(applied=True, grad_norm=1.0, version=self.version)

    async def publish(self, folder: Path | None = None) -> WeightsHandle:
        return WeightsHandle(self.version)

    async def sync_teacher(self, rate: float = 1.0) -> None: ...

    async def load(self, weights: WeightsHandle) -> None: ...

    def end_session(self, session: str) -> None: ...

    async def save_state(self, folder: Path) -> None: ...

    async def load_state(self, folder: Path) -> None: ...


# ------------------------------------------------------- what the worker process of `engine.name=vllm` uses of vLLM

__version__ = "0.32.0"


class SamplingParams(SimpleNamespace):
    """Only keeps what it is given."""


class LLM:
    """Has no prefix cache: each turn prefills its whole prompt."""

    def __init__(self, model: str, *, max_num_seqs: int, **_: Any) -> None:
        torch.set_num_threads(1)
        files.read(MODEL).tokenizer.save_pretrained(model)  # published weights come without one
        self._engine = TorchEngine(model, device="cpu", max_sessions=max_num_seqs)
        self._decoder = self._engine.decoders["student"]
        self._due: dict[str, Future[Any]] = {}
        self.llm_engine = self

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[Any]:
        assert method == "reload_weights"
        for file in Path(kwargs["weights_path"]).glob("*.safetensors"):
            self._engine.model.load_state_dict(load_file(file), strict=False)  # tied weights are there once
        return [None]

    def reset_prefix_cache(self) -> bool:
        self._engine.forget_caches()
        return True

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        if not self._due:
            self._decoder.set_stop_tokens(frozenset(params.stop_token_ids))
        request = SampleRequest(tuple(prompt["prompt_token_ids"]), params.max_tokens, params.seed, params.temperature)
        self._due[request_id] = Future()
        self._decoder.submit(request, self._due[request_id])

    def has_unfinished_requests(self) -> bool:
        return bool(self._due)

    def step(self) -> list[Any]:
        self._decoder.advance()
        done = [name for name, future in self._due.items() if future.done()]
        return [_output(name, *self._due.pop(name).result()) for name in done]


def _output(name: str, tokens: tuple[int, ...], logprobs: tuple[float, ...], stopped: bool) -> Any:
    places = [{token: SimpleNamespace(logprob=p)} for token, p in zip(tokens, logprobs, strict=True)]
    output = SimpleNamespace(finish_reason="stop" if stopped else "length", token_ids=tokens, logprobs=places)
    return SimpleNamespace(finished=True, request_id=name, outputs=[output], num_cached_tokens=0)
