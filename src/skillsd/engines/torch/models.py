"""Load a policy: a model folder, a hub name, the tiny agent shipped with this package, or a model fetched by pip."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from skillsd.engines.options import LoraOptions
from skillsd.engines.torch import attention, pretrained
from skillsd.errors import UserError

SHIPPED = {"nano": Path(__file__).parents[2] / "assets" / "nano-base"}
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


def load_model(name: str, *, dtype: str, device: torch.device) -> tuple[nn.Module, Any]:
    """The causal LM called `name` and its tokenizer.

    Raises:
        UserError: if there is no such model, it has no chat template, or its attention is not supported.
    """
    path = resolve(name)
    folder = local_folder(path)
    hf_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder or path)
        model = AutoModelForCausalLM.from_pretrained(
            folder or path,
            dtype=DTYPES[dtype],
            attn_implementation=attention.NAME,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"can't load the model {name!r}: {str(error).splitlines()[0]} Give a local folder, a hub name that this "
            f"machine can reach, or one of: {', '.join([*SHIPPED, *pretrained.NAMES])}"
        ) from error
    except KeyError as error:
        raise UserError(
            f"model {name!r} is not supported: its attention does not go through transformers' AttentionInterface"
        ) from error
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {name!r} has no chat template: give an instruction-tuned model")
    model = model.to(device).eval()  # type: ignore[arg-type]
    verify_attention(model, name)
    return model, tokenizer


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
    if tokenizer.chat_template != its_tokenizer.chat_template:
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
    """The ids that end a turn: the tokenizer's, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ids = configured if isinstance(configured, list) else [configured]
    stops = frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)
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


def verify_attention(model: nn.Module, name: str) -> None:
    """Compare both attention plans with the model's own eager attention.

    Catches attention that the plans don't implement (distance biases, sinks, soft caps) and models that mix tokens in
    other ways (convolutions, recurrent states), which would otherwise train wrongly without an error.

    Raises:
        UserError: if the results differ or the model can't be run.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"model {name!r} is not supported: it has layers of type {', '.join(sorted(unknown))}")
    device = next(model.parameters()).device
    # Ids from all over the vocabulary: the first ones are often special tokens, with far larger hidden states.
    ids = torch.arange(1, 13, device=device) * (config.vocab_size // 13)
    lengths, places = [7, 5], torch.tensor([2, 6, 8, 11], device=device)
    plan = attention.PackedPlan(lengths, device)
    with torch.inference_mode():
        try:
            packed = _verified_forward(model, ids, plan, places)
            # The same tokens in two passes with a KV cache, one row per sequence.
            pool, split = attention.KVPool(), torch.cat([ids[:3], ids[7:9]])
            pool.reserve(2, max(lengths))
            _verified_forward(model, split, attention.CachedPlan(pool, [0, 1], [0, 0], [3, 2], device), places[:0])
            rest = attention.CachedPlan(pool, [0, 1], [3, 2], [4, 3], device)
            cached = _verified_forward(model, torch.cat([ids[3:7], ids[9:]]), rest, torch.tensor([3, 6], device=device))
            model.set_attn_implementation("eager")  # type: ignore[operator]
            parts = ids.split(lengths)
            plain = torch.cat([model(input_ids=part.unsqueeze(0), use_cache=False).logits[0] for part in parts])
            model.set_attn_implementation(attention.NAME)  # type: ignore[operator]
        except Exception as error:  # model code can raise anything: KeyError, AttributeError ...
            raise UserError(f"model {name!r} can't be run on packed sequences: {error!r}") from error
    asked, layers = len(plan.layers_asked), config.num_hidden_layers
    if asked != layers:
        raise UserError(
            f"model {name!r} is not supported: only {asked} of its {layers} layers use the attention interface of "
            "transformers"
        )
    expected = plain[torch.cat([places, places[[1, 3]]])].float().log_softmax(-1)
    packed = torch.cat([packed, cached]).float().log_softmax(-1)
    # Below float32, rounding makes single log-probs of two correct computations differ by up to 0.7 on a real model.
    # Their mean over the vocabulary, weighted by probability, differs little (0.01).
    exact = next(model.parameters()).dtype == torch.float32
    gap = (packed - expected).abs().max() if exact else (expected.exp() * (expected - packed)).sum(-1).max()
    what, limit = ("log-probs", 1e-3) if exact else ("predicted distributions", 0.05)
    if not gap < limit:
        raise UserError(
            f"model {name!r} is not supported: its {what} on packed sequences differ from those of its own attention "
            f"(by up to {gap:.3g}, expected less than {limit})"
        )


def _verified_forward(model: nn.Module, ids: Tensor, plan: attention.Plan, places: Tensor) -> Tensor:
    logits: Tensor = model(
        input_ids=ids.unsqueeze(0),
        position_ids=plan.positions,
        use_cache=False,
        logits_to_keep=places,
        plan=plan,
    ).logits[0]
    if len(logits) != len(places):
        raise NotImplementedError(f"{type(model).__name__} does not honour logits_to_keep")
    return logits


def add_lora(model: nn.Module, options: LoraOptions) -> nn.Module:
    """Wrap the model with trainable adapters; all other weights are frozen."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("model.lora needs the package peft: pip install 'skillsd[lora]'")
    from peft import LoraConfig, PeftModel, get_peft_model

    if options.adapter is not None:
        folder = Path(options.adapter).expanduser()
        if not (folder / "adapter_config.json").is_file():
            raise UserError(
                f"no adapter in {options.adapter!r}: expected a folder with adapter_config.json and its weights, as "
                "peft writes it"
            )
        try:
            return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the adapter {options.adapter!r} does not fit the model: {str(error).splitlines()[0]} Give the model "
                "that it was trained on in model.name"
            ) from error

    targets: Any = options.target_modules
    try:
        return get_peft_model(
            model,
            LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=targets, task_type="CAUSAL_LM"),
        )
    except ValueError as error:
        raise UserError(f"model.lora.target_modules={targets!r}: {str(error).splitlines()[0]}") from error
