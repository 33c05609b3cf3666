"""Load a policy: a model folder, a hub name, the tiny agent shipped with this package, or a model fetched by pip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as hf_logging

from skillsd.engines.chat_template import chat_template, end_of_turn
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch import attention, memory, pretrained
from skillsd.engines.torch.adapters import add_lora
from skillsd.engines.torch.fused_norms import fuse_norms
from skillsd.errors import UserError

_ASSETS = Path(__file__).parents[2] / "assets"
SHIPPED = {"nano": _ASSETS / "nano-base", "rulebook-nano": _ASSETS / "rulebook-base"}
"""Models that come with the package, by name."""

MADE_HERE = "models/"
"""Where `skillsd sft` writes its models. A name with this prefix is never looked up on a hub."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; ``auto`` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, but this machine (or this build of torch) has no CUDA: use auto or cpu")
    return device


def resolve(name: str) -> str:
    """The folder of a model that this package knows by name, fetched if necessary; any other name unchanged."""
    if name in pretrained.NAMES:
        return str(pretrained.fetch(name))
    return str(SHIPPED[name]) if name in SHIPPED else name


def local_folder(path: str) -> Path | None:
    """The local folder that a model's name refers to; None if it can only be a name on a hub.

    Raises:
        UserError: if there is no model in it.
    """
    folder = Path(path).expanduser()
    if not path.startswith((".", "/", "~", MADE_HERE)) and not folder.exists():
        return None
    if not (folder / "config.json").is_file():
        raise UserError(
            f"no model in {path!r}: expected a folder with config.json, weights and a tokenizer"
            + (f", as `skillsd sft {folder.name}` makes it" if path.startswith(MADE_HERE) else "")
            + f". Models by name: {', '.join([*SHIPPED, *pretrained.NAMES])}"
        )
    return folder


def load_model(
    name: str, *, dtype: str, device: torch.device, lora: LoraOptions | None = None
) -> tuple[nn.Module, Any]:
    """The causal LM called `name`, with adapters if wanted, in evaluation mode, and its tokenizer.

    Nothing is random in it: dropout, of adapters too, is off in sampling, scoring and training.

    Raises:
        UserError: if there is no such model, its files are damaged or incomplete, it has no chat template, or the
            adapter does not fit it.
        EngineFailedError: if it does not fit into memory.
    """
    path = resolve(name)
    folder = local_folder(path)
    hf_logging.disable_progress_bar()
    with memory.explained("loading the model"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder or path)
            if folder is not None and (folder / "generation_config.json").is_file():
                GenerationConfig.from_pretrained(folder)  # loading a model ignores a damaged one, stop tokens and all
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder or path, dtype=DTYPES[dtype], attn_implementation=attention.NAME, output_loading_info=True
            )
        except KeyError as error:
            if attention.NAME not in str(error):
                raise _unreadable(name, folder, error) from error
            raise UserError(
                f"model {name!r} is not supported: its attention does not go through transformers' AttentionInterface"
            ) from error
        except Exception as error:  # damaged files raise almost anything: SafetensorError, a bare Exception ...
            if memory.is_out_of_memory(error):
                raise
            raise _unreadable(name, folder, error) from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"the weights of {name!r} are incomplete: {len(missing)} tensors that its configuration needs are "
                f"missing, e.g. {missing[0]!r}. Copy the model again"
            )
        chat_template(tokenizer)
        model.generation_config = _writable(model.generation_config)
        model = model.to(device)
        if device.type == "cuda":
            fuse_norms(model)
        return (add_lora(model, lora) if lora else model).eval(), tokenizer


def _unreadable(name: str, folder: Path | None, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if folder is None:
        return UserError(
            f"can't load the model {name!r}: {reason} Give a local folder, a hub name that this machine can reach, or "
            f"one of: {', '.join([*SHIPPED, *pretrained.NAMES])}"
        )
    return UserError(
        f"can't load the model {name!r}: {type(error).__name__}: {reason}. A file in {str(folder)!r} is missing, "
        "damaged or cut off, or of a kind that this version of transformers can't read: copy the model again"
    )


def _writable(config: GenerationConfig) -> GenerationConfig:
    """A generation config that `transformers` agrees to save again.

    Many published ones have a temperature without ``do_sample``. They can be read, but before transformers 5.22 not be
    written.
    """
    for do_sample in (config.do_sample, True):
        config.do_sample = do_sample
        try:
            config.validate(strict=True)
        except ValueError:
            continue
        return config
    return GenerationConfig(
        eos_token_id=config.eos_token_id, bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id
    )


def load_teacher(name: str, student: nn.Module, tokenizer: Any, *, dtype: str, device: torch.device) -> nn.Module:
    """An external teacher: another model, frozen, with the student's tokenizer.

    It may have more logits than the student, as padding; those stand for no token.

    Raises:
        UserError: as `load_model`, or if its vocabulary, stop tokens or chat template differ from the student's.
    """
    teacher, its_tokenizer = load_model(name, dtype=dtype, device=device)
    ours, theirs = tokenizer.get_vocab(), its_tokenizer.get_vocab()
    different = [token for token, _ in sorted(ours.items() ^ theirs.items())]
    if different:
        raise UserError(
            f"the teacher {name!r} has another vocabulary than the student: they differ in {len(set(different))} "
            f"tokens, e.g. {different[0]!r}. Give a teacher with the student's tokenizer"
        )
    stops, its_stops = stop_tokens(student, tokenizer), stop_tokens(teacher, its_tokenizer)
    if stops != its_stops:
        raise UserError(
            f"the teacher {name!r} ends its turns with other tokens ({sorted(its_stops)}) than the student "
            f"({sorted(stops)}): if they are equivalent, set eos_token_id in its generation_config.json"
        )
    if chat_template(tokenizer) != chat_template(its_tokenizer):
        raise UserError(
            f"the teacher {name!r} has another chat template than the student, so the prompts would be in a format "
            "that it was not trained on. Give a teacher with the student's template"
        )
    width, its_width = vocabulary(student.config), vocabulary(teacher.config)
    if its_width < width:
        raise UserError(
            f"the teacher {name!r} has {its_width} logits and the student {width}: expected at least as many"
        )
    return teacher.requires_grad_(False)


def stop_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The ids that end a turn: the tokenizer's, those of the model's generation config, and the chat template's.

    Base models and folders without ``generation_config.json`` often don't name the last one: Qwen's base models stop at
    ``<|endoftext|>``, while their template ends a turn with ``<|im_end|>``.
    """
    configured = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ids = configured if isinstance(configured, list) else [configured]
    written = end_of_turn(tokenizer)
    stops = frozenset(i for i in [*ids, tokenizer.eos_token_id, written] if i is not None)
    if not stops:
        raise UserError(
            f"the model has no end-of-turn token: set eos_token_id in its generation_config.json "
            f"(found {json.dumps(configured)})"
        )
    return stops


def vocabulary(config: Any) -> int:
    """Number of logits, which can be larger than the number of tokens."""
    return int(config.get_text_config().vocab_size)


def longest_sequence(config: Any) -> int:
    """The most tokens that a sequence may have.

    With longrope, rotary frequencies change once the longest sequence of a batch exceeds a limit. Beyond it, a
    sequence's keys would depend on the batch, and cached keys would not match new ones, so that limit applies.
    """
    config = config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        longest = min(longest, int(rope.get("original_max_position_embeddings") or longest))
    return longest
