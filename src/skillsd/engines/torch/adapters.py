"""LoRA adapters by peft: new ones, or an existing folder."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from skillsd.engines.options import LoraOptions
from skillsd.errors import UserError


def add_lora(model: nn.Module, options: LoraOptions) -> nn.Module:
    """Wrap the model with trainable adapters; all other weights are frozen.

    Raises:
        UserError: if peft is missing, or there is no such adapter, or it does not fit the model.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("model.lora needs a package: pip install peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about peft's own use of transformers
        return _new(model, options) if options.adapter is None else load_adapter(model, options.adapter)


def _new(model: nn.Module, options: LoraOptions) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets: Any = options.target_modules
    try:
        return get_peft_model(
            model,
            LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=targets, task_type="CAUSAL_LM"),
        )
    except ValueError as error:
        raise UserError(f"model.lora.target_modules={targets!r}: {str(error).splitlines()[0]}") from error


def load_adapter(model: nn.Module, adapter: str) -> nn.Module:
    """Wrap the model with the adapter in a folder, trainable.

    Raises:
        UserError: if it is missing, damaged, of another kind than LoRA, or does not fit the model.
    """
    from peft import PeftConfig, PeftModel

    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"no adapter in {adapter!r}: expected a folder with adapter_config.json and its weights, as peft writes it"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA" or getattr(config, "alora_invocation_tokens", None):
            raise UserError(
                f"the adapter {adapter!r} is of the kind {'activated LoRA' if kind == 'LORA' else kind}: expected LoRA "
                "(or DoRA, rsLoRA), which changes the weights only"
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except UserError:
        raise
    except Exception as error:  # damaged files raise almost anything
        raise UserError(
            f"the adapter {adapter!r} is damaged or does not fit the model: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''} Give the model that it was trained on in model.name"
        ) from error
    if missing := [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]:
        raise UserError(
            f"the adapter {adapter!r} does not fit the model: its file lacks weights. {missing[0][:300]} Give the "
            "model that it was trained on in model.name"
        )
    return wrapped
