"""AdamW whose float32 master weights and moments are divided among ranks that each hold all weights (ZeRO stage 1)."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from skillsd.engines.torch.optimiser import MasterAdamW
from skillsd.engines.torch.slices import own_part, whole


class SlicedAdamW(MasterAdamW):
    """`MasterAdamW` over ranks (Rajbhandari et al., 2020, *ZeRO*): each rank updates a slice of every weight.

    Each rank sums the gradient of its own micro-batches in float32. `reduce` sums over the ranks; `step` updates the
    slices and gives all ranks the whole weights, in place: CUDA graphs read these tensors.
    """

    def __init__(
        self, parameters: Iterable[Tensor], mesh: DeviceMesh, *, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self._mesh = mesh
        super().__init__(parameters, betas=betas, weight_decay=weight_decay)

    def _master(self, parameter: Tensor) -> Tensor:
        # Cloned: a slice may be a view of the weight, which `step` would then change twice.
        return (
            distribute_tensor(parameter.detach().float(), self._mesh, [Shard(0)], src_data_rank=None)
            .clone()
            .requires_grad_()
        )

    def _whole(self, master: Tensor) -> Tensor:
        return whole(master)

    def _sum(self, parameter: Tensor, master: Tensor) -> Any:
        return parameter if parameter.dtype == torch.float32 else SimpleNamespace(grad=None)

    def reduce(self) -> None:
        """Sum the gradients of all ranks; each keeps its slice of the sum. All ranks have to call this."""
        for parameter, master, total in zip(self.parameters, self.masters, self.sums, strict=True):
            own = total.grad  # None in a rank without micro-batches
            if own is None:
                own = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            parts = DTensor.from_local(own, self._mesh, [Partial()], run_check=False)
            master.grad = parts.redistribute(placements=[Shard(0)])
            total.grad = None

    def missing_bytes(self) -> int:
        sums = sum(4 * p.numel() for p, total in zip(self.parameters, self.sums, strict=True) if total.grad is None)
        return sums + super().missing_bytes()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if parameter.dtype == torch.float32:  # loaded before
                    master.copy_(own_part(parameter.detach(), master))
