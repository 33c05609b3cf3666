"""What has to be known here of a model that is elsewhere: its tokenizer, its stop tokens, its longest sequence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from skillsd.engines.chat_template import chat_template
from skillsd.engines.torch.models import local_folder, longest_sequence, resolve, stop_tokens
from skillsd.errors import UserError


class ModelFiles(NamedTuple):
    """A model without its weights.

    Attributes:
        max_length: the most tokens of a sequence.
    """

    tokenizer: Any
    stop_tokens: frozenset[int]
    max_length: int


def read(name: str) -> ModelFiles:
    """Tokenizer and configuration of a model's folder or hub name.

    Raises:
        UserError: if there is no such model, or it has no chat template or stop token.
    """
    path = resolve(name)
    source = local_folder(path) or path
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(source), AutoConfig.from_pretrained(source)
    except Exception as error:  # damaged files raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"can't read the tokenizer and configuration of {name!r} (model.name): {reason} Give a folder with them, "
            "or a hub name that this machine can reach. The weights are at the server (engine.base_model)"
        ) from error
    chat_template(tokenizer)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # there is none
        generation = GenerationConfig.from_model_config(config)
    model: Any = SimpleNamespace(generation_config=generation)
    return ModelFiles(tokenizer, stop_tokens(model, tokenizer), longest_sequence(config))
