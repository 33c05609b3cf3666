"""A new tiny model with its own tokenizer, for an environment with a small, fixed vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from skillsd.config import ArchitectureSection
from skillsd.errors import UserError
from skillsd.files.write import writing

PAD = "<|pad|>"

CHAT_TEMPLATE = "{% for message in messages %}{{ ' ' + message['content'] | trim }}{% endfor %}"
"""Concatenates the messages, with a space before each. No role markers: only the agent's messages are moves."""


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE. Words that occur at least twice in `texts` become single tokens."""
    tokenizer = Tokenizer(models.BPE())
    # As in GPT-2, a word includes the space before it, so that a turn of three words is three tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\S+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(
    folder: Path, architecture: ArchitectureSection, texts: Iterable[str], replies: Iterable[str], seed: int
) -> None:
    """Write an untrained model and its tokenizer into `folder`.

    Args:
        texts: training texts of the tokenizer.
        replies: all possible replies of the agent, each a single word. These words are stop tokens, so that a turn is
            one sampled token, without an end-of-turn token.

    Raises:
        UserError: if a reply is not a single token, or begins with another one, which would end it.
    """
    hf_logging.disable_progress_bar()
    tokenizer = make_tokenizer(texts, architecture.vocabulary)
    stops: list[int] = []
    replies = sorted(replies)
    for reply, following in itertools.pairwise(replies):
        if following.startswith(reply):
            raise UserError(
                f"the reply {reply!r} is the beginning of the reply {following!r}, and ends a turn: write replies of "
                "which none begins with another one, for example numbers with leading zeros"
            )
    for reply in replies:
        ids = tokenizer.encode(f" {reply}", add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(f"the reply {reply!r} is {len(ids)} tokens in the new tokenizer, expected a single one")
        stops += ids
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.heads,
        max_position_embeddings=architecture.max_length,
        tie_word_embeddings=True,
        initializer_range=architecture.init_std,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=stops,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    with writing(folder, by_library=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
