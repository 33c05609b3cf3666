"""AdamW with float32 master copies of bfloat16 weights."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class MasterAdamW:
    """AdamW over `parameters`; those in bfloat16 are updated through a float32 copy (4 bytes per parameter).

    A step of 1e-6 on a weight of 0.1 is below bfloat16's resolution and would be lost. So would much of a micro-batch's
    gradient when added to the sum over many. Gradients are therefore summed in float32 too, in the `grad` of the master
    copies, which is the gradient to clip.
    """

    def __init__(self, parameters: Iterable[Tensor], *, betas: tuple[float, float], weight_decay: float) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(partial(_accumulate, master))
        self.adamw = torch.optim.AdamW(self.masters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)

    def step(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)

    def zero_grad(self) -> None:
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def state_dict(self) -> dict[str, Any]:
        masters = [m.detach() for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        kept = [m for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        with torch.no_grad():
            for master, saved in zip(kept, state["masters"], strict=True):
                master.copy_(saved)


def _accumulate(master: Tensor, parameter: Tensor) -> None:
    """Move a gradient that a backward pass has just written to the master copy."""
    assert parameter.grad is not None
    grad = parameter.grad.float()
    master.grad = grad if master.grad is None else master.grad.add_(grad)
    parameter.grad = None
