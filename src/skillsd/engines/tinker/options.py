"""The section ``engine`` of a recipe for a Tinker server. Light: imports neither torch nor the SDK."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

from skillsd.engines.options import Capabilities, EngineOptions, EngineSpec
from skillsd.engines.tinker.settings import TinkerSettings
from skillsd.errors import UserError

if TYPE_CHECKING:
    from skillsd.engines.base import Engine
    from skillsd.engines.estimate import Workload

ALPHA = 32
"""The servers' LoRA alpha, which a request can't change."""


class TinkerOptions(TinkerSettings, EngineOptions):
    """A server that speaks the Tinker protocol samples, scores and trains: the hosted service, or SkyRL's. LoRA only.
    docs/tinker.md."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True, teacher_snapshot=True, refuses_non_finite=True, concurrent=True
    )

    name: str = "tinker"

    def provides(self) -> Capabilities:
        return dataclasses.replace(self.capabilities, teacher_snapshot=self.traits.keeps_snapshots)

    def check(self, spec: EngineSpec) -> None:
        if spec.teacher == "snapshot" and not self.traits.keeps_snapshots:
            raise UserError(
                f"{spec.needs.get('teacher_snapshot', 'the teacher')} needs a teacher with weights of its own, but a "
                f"server of the kind engine.server={self.server} does not keep earlier weights while it trains: use a "
                "method whose teacher is synchronised, with teacher.sync_every=1"
            )
        super().check(spec)
        if spec.lora is None:
            raise UserError("the engine 'tinker' trains LoRA adapters only: set model.lora={}")
        if spec.lora.adapter is not None:
            raise UserError(
                f"model.adapter is {spec.lora.adapter!r}, but the engine 'tinker' can't upload an adapter: set "
                "model.lora={} for a new one"
            )
        fixed = {"alpha": (spec.lora.alpha, ALPHA), "target_modules": (spec.lora.target_modules, "all-linear")}
        for key, (given, only) in fixed.items():
            if given != only:
                raise UserError(f"model.lora.{key} is {given!r}, but servers of the engine 'tinker' fix it at {only!r}")
        if not self.traits.clips and math.isfinite(spec.max_grad_norm):
            raise UserError(
                f"training.max_grad_norm is {spec.max_grad_norm:g}, but a server of the kind engine.server="
                f"{self.server} does not clip at the norm that a recipe gives: set training.max_grad_norm=.inf (and "
                "let the server clip, if its own configuration can)"
            )

    def resume_key(self) -> dict[str, Any]:
        """Not the address, key, deadlines and prices: these may change when a run is resumed."""
        return {"name": self.name, "server": self.server, "base_model": self.base_model, "route": self.route}

    def build(self, spec: EngineSpec) -> Engine:
        from skillsd.engines.base import Engine
        from skillsd.engines.tinker.service import check_sdk

        check_sdk(self)
        from skillsd.engines.tinker.engine import TinkerEngine  # imports the SDK

        engine = TinkerEngine(self, spec)
        return Engine(engine, engine, self.name, self.provides())

    def usage(self, spec: EngineSpec, workload: Workload, iterations: int) -> list[str]:
        from skillsd.engines.tinker.usage import lines

        return lines(self, spec, workload, iterations)
