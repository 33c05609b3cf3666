"""An engine that samples while it trains: the embedded one, and a copy of it with the weights published last."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from pathlib import Path
from typing import ClassVar

from skillsd.engines.base import Engine, Sample, Sampler, SampleRequest, StepReport, WeightsHandle
from skillsd.engines.options import Capabilities, EngineOptions, EngineSpec
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.options import TorchOptions


class Copy(Sampler):
    """Samples with published weights.

    Attributes:
        log: what happened, in order, shared with the `Watched` learner.
    """

    def __init__(self, learner: Watched) -> None:
        self._learner, self.log = learner, learner.log
        self.max_length = learner.max_length
        self._folder = tempfile.TemporaryDirectory()
        self.inbox = Path(self._folder.name)
        learner.tokenizer.save_pretrained(self.inbox)
        self._engine: TorchEngine | None = None
        self._version = 0
        self.under_way = 0

    async def load(self, weights: WeightsHandle) -> None:
        assert not self.under_way, "weights were changed under a request"
        self._engine, self._version = TorchEngine(str(self.inbox), device="cpu"), weights.version

    async def sample(self, request: SampleRequest) -> Sample:
        assert self._engine is not None
        self.log.append("sample")
        self.under_way += 1
        try:
            found = await self._engine.sample(request)
        finally:
            self.under_way -= 1
        return Sample(found.tokens, found.logprobs, found.stop_reason, self._version)

    def end_session(self, session: str) -> None:
        if self._engine is not None:
            self._engine.end_session(session)

    async def sleep(self) -> None:
        self.log.append("sleep")

    async def verified(self) -> None:
        """Once the first samples have come."""
        while not self.under_way:
            await asyncio.sleep(0)
        self.log.append("verified")

    def close(self) -> None:
        self._folder.cleanup()


class Watched(TorchEngine):
    """Notes its calls."""

    log: list[str]

    async def step(self, learning_rate: float) -> StepReport:
        report = await super().step(learning_rate)
        self.log.append("step")
        return report


class TwoCopies(EngineOptions):
    capabilities: ClassVar[Capabilities] = dataclasses.replace(TorchOptions.capabilities, concurrent=True)

    name: str = "two_copies:TwoCopies"

    def build(self, spec: EngineSpec) -> Engine:
        learner = Watched(
            spec.model, device="cpu", in_thread=spec.in_thread, teacher_follows=spec.teacher != "snapshot"
        )
        learner.log = []
        return Engine(learner, Copy(learner), self.name, self.capabilities)
