"""The weights divided among the ranks too: FSDP2 (`torch.distributed.fsdp.fully_shard`), layer by layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from skillsd.engines.base import StepReport, TokenSequence, Weights
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.forward import Network
from skillsd.engines.torch.lm_head import TrunkAndHead
from skillsd.engines.torch.models import load_model
from skillsd.engines.torch.ranks.rank import Passes, RankEngine, TooLarge
from skillsd.engines.torch.ranks.rounds import Finished, Round
from skillsd.engines.torch.slices import gathered
from skillsd.objective.logprobs import WHOLE, TokenLogprobs


class Sharded:
    """`model`, divided among the ranks in place: its parameters are slices from now on.

    In scoring and training each layer's weights are gathered for its own pass only, so all ranks have to make the same
    number of passes. For sampling, `gather` makes the model whole in every rank, until `forget`.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        # Computes in the weights' own dtype. A bfloat16 gradient is summed over the ranks in float32.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self._root = model
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._whole = False
        # The loss is normalised over the whole minibatch, so gradients are summed. (These settings don't recurse.)
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def gather(self) -> None:
        """Make the model whole. Not in inference mode: what is gathered there can't be used in a backward pass."""
        if self._whole:
            return
        for module in self._modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        self._whole = True

    def forget(self) -> None:
        """Keep the slices only: they have changed, or the memory is needed."""
        for module in self._modules:
            module.set_reshard_after_forward(module is not self._root, recurse=False)
            module.reshard()
        self._whole = False


class LayerEngine(RankEngine):
    """The embedded engine in one rank. It holds a slice of all weights, and of the optimiser's state."""

    _alone_in_a_pass = False
    _without_gradient = torch.no_grad  # in inference mode nothing may be gathered

    def __init__(self, model: str, *, device: str, dtype: str = "float32", lora: Any = None, **options: Any) -> None:
        self._load = partial(load_model, model, dtype=dtype, lora=lora)
        self._sharded: dict[Weights, Sharded] = {}
        # Steps on a GPU that are captured as graphs would hold the addresses of weights that are gathered anew.
        super().__init__(model, device=device, dtype=dtype, lora=lora, **{**options, "decode": "plain"})

    def _prepare_training(self, **options: Any) -> None:
        # Before the optimiser, which would otherwise update weights that are no longer the model's.
        self._sharded["student"] = Sharded(self.model, self.mesh)
        if self._external is not None:
            assert isinstance(self._external.run, nn.Module)
            self._sharded["teacher"] = Sharded(self._external.run, self.mesh)
        TorchEngine._prepare_training(self, **options)  # an optimiser of slices
        for sharded in self._sharded.values():  # the decoders try the model
            sharded.gather()

    def _reduce(self) -> None:
        """The backward pass has summed the gradients."""

    def _snapshot(self) -> dict[str, Tensor]:
        # A second model: `torch.func.functional_call` can't replace the weights of one that is divided.
        teacher, _ = self._load(device=self.device)
        teacher.load_state_dict(self._whole_weights(keep=True))
        self._sharded["teacher"] = Sharded(teacher.requires_grad_(False), self.mesh)
        self._teacher_network = replace(self._student, run=teacher, split=TrunkAndHead(teacher))
        weights = dict(teacher.named_parameters())
        return {name: weights[name] for name in self.trainable}

    def _whole_weights(self, *, keep: bool) -> dict[str, Tensor]:
        """The student's weights on the CPU of each rank that keeps them."""
        self._sharded["student"].forget()
        found: dict[str, Tensor] = gathered(self.model.state_dict(), keep=keep)
        return found

    def _network(self, weights: Weights) -> Network:
        if weights == "teacher" and self.teacher is not None:
            return self._teacher_network
        return super()._network(weights)

    def _forget(self) -> None:
        for sharded in self._sharded.values():
            sharded.forget()

    # -- what all ranks do --------------------------------------------------------------------------------------

    def play(self, news: Round, weights: Weights) -> Finished:
        self._sharded[weights].gather()
        return super().play(news, weights)

    def score(self, passes: Passes, *how: Any) -> list[list[TokenLogprobs]] | TooLarge:
        self._forget()
        return super().score(passes, *how)

    def learn(self, passes: Passes, *how: Any) -> Any:
        self._forget()
        return super().learn(passes, *how)

    def update(self, *how: Any) -> StepReport:
        report = super().update(*how)
        self._forget()
        return report

    def sync(self, rate: float) -> None:
        super().sync(rate)
        self._forget()

    def restore(self, folder: Any) -> None:
        super().restore(folder)
        self._forget()

    # -- weights out --------------------------------------------------------------------------------------------

    def prepare_export(self) -> None:
        super().prepare_export()
        weights = self._whole_weights(keep=self.rank == 0)
        if self.rank == 0:
            if self._exported is self.model:
                self._exported, _ = self._load(device=torch.device("cpu"))
            self._exported.load_state_dict(weights)

    def _predicted(self, sequence: TokenSequence) -> TokenLogprobs:
        copy = Network(self._exported, TrunkAndHead(self._exported), self.vocabulary, torch.device("cpu"))
        with torch.inference_mode():
            return TokenLogprobs(*copy.forward([sequence], [0], 1.0, WHOLE))
