"""The embedded engine's section of the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from skillsd.engines.options import Capabilities, EngineOptions, EngineSpec

if TYPE_CHECKING:
    from skillsd.engines.base import Engine
    from skillsd.engines.estimate import Estimator, Workload


class TorchOptions(EngineOptions):
    """The embedded engine: PyTorch in this process, on one device; it samples, scores and trains."""

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

    def build(self, spec: EngineSpec) -> Engine:
        import torch

        from skillsd.engines.base import Engine
        from skillsd.engines.torch.engine import TorchEngine

        if spec.threads:
            torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)  # new adapters have random initial weights
        engine = TorchEngine(
            spec.model,
            dtype=spec.dtype,
            device=spec.device,
            lora=spec.lora,
            teacher_follows=spec.teacher in ("none", "student"),
            teacher_model=spec.teacher_model,
            micro_batch_tokens=spec.micro_batch_tokens,
            max_sessions=spec.max_sessions,
            betas=spec.betas,
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.max_grad_norm,
            gradient_checkpointing=spec.gradient_checkpointing,
            in_thread=spec.in_thread,
            decode=self.decode,
        )
        return Engine(engine, engine, self.name, self.provides())

    def resume_key(self) -> dict[str, Any]:
        return {"name": self.name}  # `decode` changes the rounding only

    def estimator(self, spec: EngineSpec, workload: Workload) -> Estimator:
        from skillsd.engines.torch.estimate import TorchEstimator

        return TorchEstimator(spec, workload)
