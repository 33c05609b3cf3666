"""The embedded engine's section of the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from skillsd.engines.options import Capabilities, EngineOptions, EngineSpec
from skillsd.engines.torch.ranks import launched
from skillsd.errors import UserError

if TYPE_CHECKING:
    from skillsd.engines.base import Engine
    from skillsd.engines.estimate import Estimator, Workload
    from skillsd.engines.torch.ranks.leader import Leader


class TorchOptions(EngineOptions):
    """The embedded engine: PyTorch in this process, on one device, or in several ranks on a device each; it samples,
    scores and trains."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        distribution=True,
        temperature=True,
        teacher_snapshot=True,
        teacher_average=True,
        teacher_external=True,
        teacher_sampling=True,
        lora=True,
        refuses_non_finite=True,
        deterministic=True,  # on a CPU; some GPU kernels sum in no fixed order
        exact_resume=True,
        publishes_folder=True,
    )

    name: str = "torch"

    decode: Literal["auto", "plain", "static"] = "auto"
    """How tokens are sampled: `static` steps of fixed shape, without the host between tokens (on a GPU as CUDA graphs);
    `plain` steps, built one by one; `auto` is static on a GPU and plain on a CPU."""

    shard: Literal["none", "state", "layers"] = "none"
    """What several ranks (`skillsd train --gpus N`) divide among them: `state`: the optimiser's master weights and
    moments, while each rank holds all weights; `layers`: the weights too, gathered layer by layer. docs/scale.md."""

    rank_seconds: float = Field(600.0, gt=0)
    """The longest that one rank may keep the others waiting, before the run is ended and started again."""

    def build(self, spec: EngineSpec) -> Engine:
        import torch

        from skillsd.engines.base import Engine
        from skillsd.engines.torch.engine import TorchEngine

        if spec.threads:
            torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)  # new adapters have random initial weights
        options: dict[str, Any] = {
            "dtype": spec.dtype,
            "lora": spec.lora,
            "teacher_follows": spec.teacher in ("none", "student"),
            "teacher_model": spec.teacher_model,
            "micro_batch_tokens": spec.micro_batch_tokens,
            "max_sessions": spec.max_sessions,
            "betas": spec.betas,
            "weight_decay": spec.weight_decay,
            "max_grad_norm": spec.max_grad_norm,
            "gradient_checkpointing": spec.gradient_checkpointing,
            "in_thread": spec.in_thread,
            "decode": self.decode,
        }
        engine = self._in_ranks(spec, options) or TorchEngine(spec.model, device=spec.device, **options)
        return Engine(engine, engine, self.name, self.provides())

    def _in_ranks(self, spec: EngineSpec, options: dict[str, Any]) -> Leader | None:
        """The engine of all ranks; None if this process leads none, or they divide nothing."""
        from skillsd.engines.torch.models import pick_device
        from skillsd.engines.torch.ranks import group
        from skillsd.engines.torch.ranks.leader import Leader

        ranks = group.leader()
        if ranks is None or self.shard == "none":
            if launched.size() > 1:
                raise UserError("torchrun can start only `skillsd train`, with engine.shard=state or layers")
            return None
        ranks.seconds = self.rank_seconds
        device = pick_device(spec.device).type
        return Leader(ranks, self.shard, spec.model, device=device, seed=spec.seed, threads=spec.threads, **options)

    def resume_key(self) -> dict[str, Any]:
        return {"name": self.name}  # the others change the rounding only

    def estimator(self, spec: EngineSpec, workload: Workload) -> Estimator:
        from skillsd.engines.torch.estimate import TorchEstimator

        return TorchEstimator(spec, workload)
