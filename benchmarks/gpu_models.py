"""Models of real sizes with random weights, made on the spot from their configurations, and their arithmetic."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from skillsd.engines.base import Engine
from skillsd.engines.options import EngineSpec
from skillsd.engines.torch.options import TorchOptions
from skillsd.engines.torch.sizes import Sizes

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    },
    "Qwen3-1.7B": {
        "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "Qwen3-4B": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
}  # fmt: skip
TOY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 600,
}  # fmt: skip

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "user\nassistant\nSokoban: #r1c1 .r1c1 @r1c1 $r1c1 *r1c1 Invalid Solved Over Up Down Left Right\n"
"""The words that the tokenizer has tokens for, as a large one would."""

LOGITS = 4.0
"""Standard deviation of the random models' logits: entropies of about 3 nats, as a language model's."""


@dataclass
class Made:
    """A model's folder, without weights, and its sizes."""

    name: str
    folder: Path
    sizes: Sizes
    attention_width: int
    """Heads times their width."""

    def flops(self, lengths: Sequence[int], shared: Sequence[int], marked: int) -> float:
        """Floating-point operations of one forward pass that computes every distinct token once.

        Args:
            lengths: of the sequences.
            shared: of each, the tokens that an earlier one has, too.
            marked: tokens whose log-probs are computed.
        """
        tokens = sum(lengths) - sum(shared)
        pairs = sum((n * (n + 1) - s * (s + 1)) / 2 for n, s in zip(lengths, shared, strict=True))
        attention = 4 * self.sizes.layers * self.attention_width * pairs
        return 2 * self.sizes.matrices * tokens + attention + 2 * self.sizes.head * marked


def write(name: str, folder: Path, *, toy: bool) -> Made:
    """A model's folder: configuration and tokenizer, no weights."""
    options = {**SHAPES[name], **(TOY if toy else {})}
    config = AutoConfig.for_model(
        options.pop("model_type"), **options, tie_word_embeddings=True, max_position_embeddings=8192,
        pad_token_id=0, bos_token_id=None, eos_token_id=2, use_cache=True,
    )  # fmt: skip
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[2])
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    width = options["num_attention_heads"] * options["head_dim"]
    return Made(name, folder, Sizes.of(str(folder)), width)


@contextmanager
def random_weights(device: torch.device) -> Iterator[None]:
    """Loading a model makes one with random weights, on the device."""
    original = AutoModelForCausalLM.from_pretrained

    def make(folder: Any, *, output_loading_info: bool = False, **options: Any) -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **options)
        with torch.no_grad():
            head = model.get_output_embeddings().weight
            head.mul_(LOGITS / (model.config.initializer_range * head.shape[1] ** 0.5))
            for name, weight in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    # With tied embeddings a token predicts itself, with certainty, unless the layers outweigh it.
                    weight.mul_(10)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        return (model, {"missing_keys": set()}) if output_loading_info else model

    AutoModelForCausalLM.from_pretrained = make  # type: ignore[method-assign]
    try:
        yield
    finally:
        AutoModelForCausalLM.from_pretrained = original  # type: ignore[method-assign]


@contextmanager
def engine(
    made: Made, device: torch.device, *, dtype: str = "bfloat16", decode: str | None = None, **options: Any
) -> Iterator[Engine]:
    """The embedded engine with this model. `options`: of `EngineSpec`."""
    with random_weights(device):
        spec = EngineSpec(model=str(made.folder), seed=0, dtype=dtype, device=str(device), **options)
        built = TorchOptions.model_validate({} if decode is None else {"decode": decode}).build(spec)
    try:
        yield built
    finally:
        built.close()
        del built
        free(device)


def without_optimiser(built: Engine) -> None:
    """Free the float32 copies of the weights: this engine only samples."""
    learner: Any = built.learner
    for master in learner.optimiser.masters:
        master.data = master.data.new_empty(0)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
