"""The student's weights in a folder: a plain model, adapters merged, or the adapter; checked after writing."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from skillsd.engines.base import TokenSequence
from skillsd.engines.torch.adapters import load_adapter
from skillsd.engines.torch.verify import difference, probe
from skillsd.errors import UserError
from skillsd.objective.logprobs import TokenLogprobs

PROBED = 24
"""Tokens whose predictions are compared after writing."""


def write_merged(model: nn.Module, folder: Path, *, untie: bool) -> None:
    """Write `model` in the format of ``transformers``, adapters merged.

    Args:
        untie: write the output head separately even if it is tied to the embeddings, for samplers: vLLM's CPU build
            does not update a tied head, and reports no error. Done in any case if training has made them differ.

    Raises:
        UserError: if an adapter can't be merged exactly.
    """
    plain = without_adapters(model)
    for old in folder.glob("*.safetensors"):  # otherwise both would be there until the new one is complete
        old.unlink()
    weights = merged_weights(plain)
    head, embeddings = _weight_of(plain, plain.get_output_embeddings()), _weight_of(plain, plain.get_input_embeddings())
    tied = weights[head].data_ptr() == weights[embeddings].data_ptr()
    if tied and untie:
        weights[head] = weights[head].clone()
        tied = False
    plain.save_pretrained(folder, state_dict=weights, max_shard_size="10TB")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if not tied:
        path.write_text(json.dumps({**config, "tie_word_embeddings": False}, indent=2), encoding="utf-8")


def write_for_sampler(model: nn.Module, folder: Path) -> None:
    """`write_merged` with a head of its own.

    Raises:
        UserError: also if there is no room.
    """
    try:
        write_merged(model, folder, untie=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"can't write the weights for the sampler ({bytes_written(model) / 2**30:.2f} GiB) into {str(folder)!r}: "
            f"{error}. Make room there, or set TMPDIR to a folder that has it"
        ) from error


def bytes_written(model: nn.Module) -> int:
    """The most bytes that `write_merged` writes, counting the output head separately, tied or not."""
    head = without_adapters(model).get_output_embeddings()
    return sum(w.numel() * w.element_size() for w in [*model.parameters(), head.weight])


def without_adapters(model: nn.Module) -> Any:
    """The model inside its adapters' wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def merged_weights(plain: nn.Module) -> dict[str, Tensor]:
    """The merged weights, with the names and dtypes that the model has without adapters. The model is unchanged.

    Each module with an adapter is copied, merged by peft, which knows its own kinds (DoRA, biases, whole modules,
    single tokens), in float32, and moved to the CPU before the next.

    Raises:
        UserError: if peft can't merge one.
    """
    adapted = {name: module for name, module in plain.named_modules() if _is_wrapper(module)}
    weights = {name: tensor for name, tensor in plain.state_dict().items() if not _inside(name, adapted)}
    for name, module in adapted.items():
        if _inside(name, adapted):  # several adapters of one module are nested in each other
            continue
        own = _without_wrappers(module).state_dict()
        try:
            merged = _merged(module)
        except Exception as error:  # peft raises any type for what it can't merge
            raise UserError(
                f"the adapter of {name!r} can't be merged into its weights ({type(error).__name__}: {error}): export "
                "it without merging, or train another kind of adapter"
            ) from error
        weights |= {f"{name}.{key}": tensor.to(own[key].dtype).cpu() for key, tensor in merged.state_dict().items()}
    return weights


def _is_wrapper(module: nn.Module) -> bool:
    if "peft" not in sys.modules:  # not imported here: it takes seconds
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _merged(wrapper: Any) -> nn.Module:
    merged = copy.deepcopy(wrapper).float()
    if hasattr(type(merged), "unload_and_optionally_merge_module"):
        layer: nn.Module = merged.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        return layer
    merged.merge(safe_merge=True)
    return _without_wrappers(merged)


def _without_wrappers(module: nn.Module) -> nn.Module:
    while _is_wrapper(module):
        module = getattr(module, "base_layer" if "base_layer" in module._modules else "original_module")
    return module


def _inside(name: str, modules: Collection[str]) -> bool:
    """Whether a dotted name is that of a part of one of the modules."""
    parts = name.split(".")
    return any(".".join(parts[:n]) in modules for n in range(1, len(parts)))


def _weight_of(plain: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in plain.named_modules() if module is part) + ".weight"


def check_written(
    folder: Path, tokens: tuple[int, ...], expected: TokenLogprobs, *, dtype: torch.dtype, base: str | None = None
) -> None:
    """Load what was written and compare its predictions, on the CPU, where the files are mapped instead of copied.

    Args:
        expected: the whole distributions of `tokens` from the second one on, by the model that was written.
        dtype: of the model.
        base: the folder or hub name of the model that the adapter in `folder` belongs to; None if `folder` is a model.

    Raises:
        UserError: if they differ, or the folder can't be loaded.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():  # loading may draw random numbers
            model: Any = AutoModelForCausalLM.from_pretrained(base or folder, dtype=dtype, attn_implementation="eager")
            if base is not None:
                model = load_adapter(model, str(folder))
            logits = model.eval()(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"the weights just written to {str(folder)!r} can't be loaded again: {error}") from error
    exact = dtype == torch.float32
    limit = 0.01 if exact else 0.1
    whole = expected.distribution
    assert whole is not None
    gap = difference(whole, logits[:, : whole.shape[1]].float().log_softmax(-1), exact=exact)
    if not gap < limit:
        raise UserError(
            f"the weights just written to {str(folder)!r} differ from the model in training: their predictions are off "
            f"by {gap:.3g} nats (expected less than {limit}), so they are of no use. Please report this with the recipe"
        )


class WrittenCheck:
    """`check_written` for a model in training.

    Args:
        base: folder or hub name of the model without adapters.
        predict: a sequence -> the whole distributions at its marked places, by the model as it is now.
        longest: the most tokens of a sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        base: str,
        predict: Callable[[TokenSequence], TokenLogprobs],
        vocabulary: int,
        longest: int,
    ) -> None:
        self._dtype, self._base, self._predict = next(model.parameters()).dtype, base, predict
        tokens = probe(vocabulary, min(PROBED, longest))
        self._probe = TokenSequence(tokens, (False, *[True] * (len(tokens) - 1)))
        self._checked: set[tuple[str, bool]] = set()

    def check(self, folder: Path, *, adapter: bool = False) -> None:
        """Check a folder.

        Args:
            adapter: whether it holds an adapter of the base model.

        Raises:
            UserError: as `check_written`.
        """
        found = self._predict(self._probe)
        check_written(folder, self._probe.tokens, found, dtype=self._dtype, base=self._base if adapter else None)

    def check_once(self, kind: str, folder: Path, version: int, *, adapter: bool = False) -> None:
        """`check` the first folder of a kind, and the first one after an update: a new adapter changes nothing."""
        if (kind, version > 0) not in self._checked:
            self.check(folder, adapter=adapter)
            self._checked.add((kind, version > 0))
