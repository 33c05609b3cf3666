"""AdamW with float32 master copies of bfloat16 weights."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skillsd.engines.torch.slices import local_numel, own_part, whole


class MasterAdamW:
    """AdamW over `parameters`; those in bfloat16 are updated through a float32 copy (4 bytes per parameter).

    A step of 1e-6 on a weight of 0.1 is below bfloat16's resolution and would be lost. So would much of a micro-batch's
    gradient when added to the sum over many. Gradients are therefore summed in float32 too, in the `grad` of the master
    copies, which is the gradient to clip.
    """

    def __init__(self, parameters: Iterable[Tensor], *, betas: tuple[float, float], weight_decay: float) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [self._master(parameter) for parameter in self.parameters]
        # Each has a `grad`, in which a parameter's float32 gradients are summed.
        self.sums: list[Any] = [self._sum(p, m) for p, m in zip(self.parameters, self.masters, strict=True)]
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if total is not parameter:
                parameter.register_post_accumulate_grad_hook(partial(_accumulate, total))
        self.adamw = torch.optim.AdamW(self.masters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)

    def _master(self, parameter: Tensor) -> Tensor:
        return parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()

    def _whole(self, master: Tensor) -> Tensor:
        """What to copy into a parameter."""
        return master

    def _sum(self, parameter: Tensor, master: Tensor) -> Any:
        return master

    def clip(self, max_norm: float) -> float:
        """Scale the gradient down to `max_norm` if its norm is larger; returns the norm before that."""
        return whole(torch.nn.utils.clip_grad_norm_(self.masters, max_norm)).item()

    def step(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(self._whole(master.to(parameter.dtype)))

    def missing_bytes(self) -> int:
        """Bytes of float32 gradients and moments that are not allocated yet."""
        state: Any = self.adamw.state
        return sum((4 * (m.grad is None) + 8 * (not state.get(m))) * local_numel(m) for m in self.masters)

    def zero_grad(self) -> None:
        for tensor in (*self.parameters, *self.masters, *self.sums):
            tensor.grad = None

    def state_dict(self) -> dict[str, Any]:
        masters = [m.detach() for m in self._kept_masters()]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Cloned: what is loaded may be a mapped file.
        moments = {
            number: {name: own_part(value, self.masters[number]).clone() for name, value in values.items()}
            for number, values in state["adamw"]["state"].items()
        }
        self.adamw.load_state_dict({**state["adamw"], "state": moments})
        with torch.no_grad():
            for master, saved in zip(self._kept_masters(), state["masters"], strict=True):
                master.copy_(own_part(saved, master))

    def _kept_masters(self) -> list[Tensor]:
        """Those that are saved: a float32 weight is its own."""
        return [m for p, m in zip(self.parameters, self.masters, strict=True) if p.dtype != torch.float32]


def _accumulate(total: Any, parameter: Tensor) -> None:
    """Move a gradient that a backward pass has just written to the sum."""
    assert parameter.grad is not None
    grad = parameter.grad.float()
    total.grad = grad if total.grad is None else total.grad.add_(grad)
    parameter.grad = None
