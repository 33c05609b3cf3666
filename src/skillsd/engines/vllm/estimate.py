"""A run's estimate when vLLM samples: the learner's, with vLLM's reservation instead of the learner's KV cache."""

from __future__ import annotations

from skillsd.engines.estimate import SAMPLING, Estimate, Estimator, Workload
from skillsd.engines.spec import EngineSpec
from skillsd.engines.vllm.settings import VllmSettings


class VllmEstimator:
    """Wraps the learner's `skillsd.engines.estimate.Estimator`."""

    def __init__(self, learner: Estimator, options: VllmSettings) -> None:
        self._learner, self._options = learner, options
        self.device, self.free, self.total = learner.device, learner.free, learner.total

    def __call__(self, spec: EngineSpec, workload: Workload) -> Estimate:
        found = self._learner(spec, workload)
        if self.device.startswith("cuda"):
            reserved = round(self._options.gpu_memory_utilization * self.total)
        else:
            weights = next(size for name, size in found.stays.items() if name.startswith("weights"))
            reserved = weights + (self._options.cpu_kv_cache_gib << 30)
        phases = {name: parts for name, parts in found.phases.items() if name != SAMPLING}
        return Estimate({**found.stays, "vLLM's reservation": reserved}, phases, found.seconds, found.note)
