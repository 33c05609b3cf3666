"""A run's estimate when vLLM samples: the learner's, with vLLM's reservation instead of the learner's KV cache."""

from __future__ import annotations

import torch

from skillsd.engines.estimate import SAMPLING, Estimate, Estimator, Workload
from skillsd.engines.spec import EngineSpec
from skillsd.engines.vllm.settings import VllmSettings

ASLEEP = 2 << 30
"""Bytes that vLLM is assumed to keep on a GPU while it sleeps: CUDA's context and graphs."""


class VllmEstimator:
    """Wraps the learner's `skillsd.engines.estimate.Estimator`."""

    def __init__(self, learner: Estimator, options: VllmSettings) -> None:
        self._learner, self._options = learner, options
        self.device, self.free, self.total = learner.device, learner.free, learner.total
        self._gpus = torch.cuda.device_count() if options.replicas > 1 else 1

    def __call__(self, spec: EngineSpec, workload: Workload) -> Estimate:
        found, options = self._learner(spec, workload), self._options
        stays = dict(found.stays)
        phases = {name: parts for name, parts in found.phases.items() if name != SAMPLING}
        if not self.device.startswith("cuda"):
            weights = next(size for name, size in stays.items() if name.startswith("weights"))
            stays["vLLM's reservation"] = options.replicas * (weights + (options.cpu_kv_cache_gib << 30))
        elif options.shares(self.device) and (options.gpus or self._gpus <= options.replicas):
            reserved = round(options.reserved_share(self.device) * self.total)
            if options.sleeps(self.device):
                stays["vLLM, asleep"] = ASLEEP
                phases = {SAMPLING: {"vLLM's reservation": max(0, reserved - ASLEEP)}, **phases}
            else:
                stays["vLLM's reservation"] = reserved
        return Estimate(stays, phases, found.seconds, found.note)
