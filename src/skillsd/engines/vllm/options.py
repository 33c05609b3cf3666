"""vLLM's section of the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, SerializeAsAny

from skillsd.engines.options import Capabilities, EngineOptions, EngineSpec
from skillsd.engines.torch.options import TorchOptions
from skillsd.engines.vllm.settings import VllmSettings
from skillsd.errors import UserError

if TYPE_CHECKING:
    from skillsd.engines.base import Engine
    from skillsd.engines.estimate import Estimator, Workload


def _learner(section: Any) -> Any:
    from skillsd.engines import registry

    return registry.options(section) if isinstance(section, dict) else section


class VllmOptions(VllmSettings, EngineOptions):
    """vLLM samples the rollouts, in a process of its own; another engine scores and trains. docs/vllm.md."""

    capabilities: ClassVar[Capabilities] = Capabilities(temperature=True)

    name: str = "vllm"
    learner: Annotated[SerializeAsAny[EngineOptions], BeforeValidator(_learner)] = TorchOptions()
    """The engine that scores and trains: any that can publish its weights into a folder."""

    def provides(self) -> Capabilities:
        """The learner's capabilities, but not deterministic, as vLLM's decoding is not."""
        learner = self.learner.provides()
        return Capabilities(
            distribution=learner.distribution,
            temperature=learner.temperature,
            teacher_snapshot=learner.teacher_snapshot,
            teacher_average=learner.teacher_average,
            teacher_external=learner.teacher_external,
            teacher_sampling=learner.teacher_sampling,  # by the learner
            lora=learner.lora,
            refuses_non_finite=learner.refuses_non_finite,
            deterministic=False,
            exact_resume=False,
            concurrent=True,
        )

    def check(self, spec: EngineSpec) -> None:
        super().check(spec)
        self.learner.check(spec)
        if self.replicas > 1 or self.gpus:
            import torch

            count = torch.cuda.device_count()
            self.of_replica(0, "cuda" if count and spec.device == "auto" else spec.device, count)
        if not self.learner.provides().publishes_folder:
            raise UserError(
                f"engine.learner is {self.learner.name!r}, which can't publish its weights into a folder for vLLM to "
                "load: use another learner, or another engine"
            )
        if spec.ahead and self.sleep is True:
            raise UserError(
                "engine.sleep is true, but with training.ahead=1 vLLM samples while the learner trains: leave it out"
            )
        if self.max_model_len is None or spec.max_sampled_tokens is None:
            return
        needed, settings = spec.max_sampled_tokens
        if self.max_model_len < needed:
            raise UserError(
                f"engine.max_model_len is {self.max_model_len}, but sequences of up to {needed} tokens are sampled "
                f"({settings}): raise it"
            )

    def sampled_length(self, spec: EngineSpec) -> int | None:
        """The longest sequence that vLLM is started for, in tokens. None: as many as the model takes."""
        if self.max_model_len is not None:
            return self.max_model_len
        return None if spec.max_sampled_tokens is None else spec.max_sampled_tokens[0] + spec.context_tokens

    def for_learner(self) -> EngineOptions:
        return self.learner

    def resume_key(self) -> dict[str, Any]:
        """Not where vLLM is installed or how much memory it gets: these may change when a run is resumed."""
        return {"name": self.name, "learner": self.learner.resume_key()}

    def build(self, spec: EngineSpec) -> Engine:
        import torch

        from skillsd.engines.base import Engine
        from skillsd.engines.replicas import Replicas
        from skillsd.engines.vllm.sampler import VllmSampler

        trainer = self.learner.build(spec)
        learner, length = trainer.learner, self.sampled_length(spec)
        device = str(getattr(learner, "device", "elsewhere"))

        def replica(number: int) -> VllmSampler:
            settings = self.of_replica(number, device, torch.cuda.device_count())
            return VllmSampler(learner, settings, max_length=length, at_once=-(-spec.max_sessions // self.replicas))

        try:
            sampler = Replicas(replica, self.replicas, learner, tolerance=self.logprob_tolerance, ahead=spec.ahead)
        except BaseException:
            trainer.close()
            raise
        return Engine(learner, sampler, self.name, self.provides())

    def estimator(self, spec: EngineSpec, workload: Workload) -> Estimator | None:
        from skillsd.engines.vllm.estimate import VllmEstimator

        learner = self.learner.estimator(spec, workload)
        return None if learner is None else VllmEstimator(learner, self)
