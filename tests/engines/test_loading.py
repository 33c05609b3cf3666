"""What is loaded: nothing random, nothing damaged, nothing that would fail or go wrong in the first iteration."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from tokenizers import AddedToken
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from engines import tiny
from engines.tiny import DATA, embedded, torch_engine, train, view
from skillsd.engines.base import Engine, SampleRequest
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch import attention
from skillsd.engines.torch.models import load_model
from skillsd.errors import UserError

Folder = Callable[[str], Path]


def write_adapter(model: Path, folder: Path, config: Any) -> Path:
    """An adapter with random weights, in `folder`."""
    torch.manual_seed(3)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


# -- nothing is random ----------------------------------------------------------------------------------------------


def _plain(model: Path, folder: Path) -> Engine:
    return embedded(model)


def _new_lora(model: Path, folder: Path) -> Engine:
    return embedded(model, lora=LoraOptions(rank=4))


def _adapter(model: Path, folder: Path) -> Engine:
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    return embedded(model, lora=LoraOptions(adapter=str(write_adapter(model, folder, config))))


def _dora(model: Path, folder: Path) -> Engine:
    config = LoraConfig(
        r=4, lora_dropout=0.5, use_dora=True, modules_to_save=["lm_head"], target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return embedded(model, lora=LoraOptions(adapter=str(write_adapter(model, folder, config))), teacher_follows=False)


def _external(model: Path, folder: Path) -> Engine:
    return embedded(model, teacher_model=str(model))


def _checkpointed(model: Path, folder: Path) -> Engine:
    return embedded(model, gradient_checkpointing=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("load", [_plain, _new_lora, _adapter, _dora, _external, _checkpointed])
def test_two_scorings_are_equal_to_the_bit(
    load: Callable[[Path, Path], Engine], kind: str, model_folder: Folder, tmp_path: Path
) -> None:
    engine = load(model_folder(kind), tmp_path)
    assert not any(module.training for module in torch_engine(engine).model.modules())
    for weights in ("student", "teacher"):
        assert torch.equal(view(engine, weights), view(engine, weights))
    train(engine)
    assert torch.equal(view(engine), view(engine))
    requests = [SampleRequest(tokens=tuple(DATA.ids(8, i)), max_tokens=6, seed=i) for i in range(3)]
    assert tiny.sample_all(engine, requests) == tiny.sample_all(engine, requests)


BIOGPT = {**tiny.SIZES, "activation_dropout": 0.3, "hidden_dropout_prob": 0.3, "layerdrop": 0.3}


def test_recomputed_activations_have_no_dropout(tmp_path: Path) -> None:
    """BioGPT's layers and trunk apply dropout by the flag that has `transformers` recompute activations."""
    folder = tiny.write(tmp_path, "BioGpt", BIOGPT)
    views = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        engine = embedded(folder, gradient_checkpointing=checkpointing)
        train(engine, 2)
        views.append(view(engine))
    torch.testing.assert_close(*views, rtol=0, atol=1e-5)


# -- refused at loading, not in the first iteration -------------------------------------------------------------------


def test_family_whose_trunk_can_not_be_separated_is_refused(tmp_path: Path) -> None:
    sizes = {**tiny.SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}
    with pytest.raises(UserError, match=r"OPTForCausalLM is not supported: .* trunk as one module"):
        embedded(tiny.write(tmp_path, "OPT", sizes))


def test_adapters_that_a_family_can_not_run_are_refused(tmp_path: Path) -> None:
    """PhiMoE's router is a linear layer that returns a tuple, which a LoRA layer does not expect."""
    sizes = {**tiny.GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    folder = tiny.write(tmp_path, "Phimoe", sizes)
    embedded(folder)
    with pytest.raises(UserError, match="can't be run on packed sequences"):
        embedded(folder, lora=LoraOptions(rank=2))


@pytest.mark.parametrize("kind", ["CTRL", "JetMoe"])
def test_families_without_gradient_checkpointing_are_refused_with_it(kind: str, tmp_path: Path) -> None:
    sizes = {"CTRL": tiny.SIZES, "JetMoe": {**tiny.SIZES, "num_key_value_heads": 2, "kv_channels": 8}}[kind]
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing is true, but .* can't do that"):
        embedded(tiny.write(tmp_path, kind, {**sizes}), gradient_checkpointing=True)


@pytest.mark.parametrize("window", [16, 300, 512, 4096])
def test_windows_are_checked_beyond_their_end(window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {**tiny.GROUPED, "sliding_window": window, "max_position_embeddings": 8192}
    folder = tiny.write(tmp_path, "Mistral", sizes)
    embedded(folder)
    # A family whose layers leave the window to the mask, which the packed passes don't get.
    functions = AttentionInterface._global_mapping
    attend = functions[attention.NAME]
    monkeypatch.setitem(functions, attention.NAME, lambda *args, sliding_window=None, **more: attend(*args, **more))
    with pytest.raises(UserError, match="log-probs on packed sequences differ" if window < 4096 else "window of 4096"):
        embedded(folder)


def test_windows_longer_than_the_model_takes(tmp_path: Path) -> None:
    embedded(tiny.write(tmp_path, "Mistral", {**tiny.GROUPED, "sliding_window": 500, "max_position_embeddings": 64}))


# -- damaged folders --------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _without_a_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def _json(path: Path) -> None:
    path.write_text('{"a": 1}', encoding="utf-8")


def _deleted(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", _cut, "can't load the model .*: SafetensorError: .* cut off"),
        ("model.safetensors", _empty, "can't load the model"),
        ("model.safetensors", _garbage, "can't load the model"),
        ("model.safetensors", _deleted, "can't load the model"),
        ("model.safetensors", _without_a_weight, "1 tensors .* are missing, e.g. 'model.layers.1.mlp.up_proj.weight'"),
        ("tokenizer.json", _cut, "can't load the model"),
        ("tokenizer.json", _empty, "can't load the model"),
        ("tokenizer.json", _garbage, "can't load the model"),
        ("tokenizer.json", _json, "can't load the model"),
        ("tokenizer.json", _deleted, "can't load the model"),
        ("tokenizer_config.json", _cut, "can't load the model"),
        ("config.json", _cut, "can't load the model"),
        ("config.json", _json, "can't load the model"),
        ("generation_config.json", _garbage, "can't load the model"),
    ],
)
def test_damaged_folders_are_one_line(file: str, damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, *tiny.ARCHITECTURES["llama"])
    damage(folder / file)
    with pytest.raises(UserError, match=message) as caught:
        load_model(str(folder), dtype="float32", device=torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [_cut, _empty, _garbage, _json])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_adapters_are_one_line(
    file: str, damage: Callable[[Path], None], model_folder: Folder, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = write_adapter(model_folder("llama"), tmp_path, config)
    damage(adapter / file)
    with pytest.raises(UserError, match="adapter") as caught:
        embedded(model_folder("llama"), lora=LoraOptions(adapter=str(adapter)))
    assert "\n" not in str(caught.value)


def test_adapter_without_some_of_its_weights(model_folder: Folder, tmp_path: Path) -> None:
    """peft only warns, and gives the layer new random weights."""
    from safetensors.torch import load_file, save_file

    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = write_adapter(model_folder("llama"), tmp_path, config)
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.0" in name}
    assert 0 < len(kept) < len(weights)
    save_file(kept, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not fit the model: its file lacks weights"):
        embedded(model_folder("llama"), lora=LoraOptions(adapter=str(adapter)))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type=TaskType.CAUSAL_LM), "IA3"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM), "PROMPT_TUNING"),
        (
            LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
            "activated LoRA",
        ),
    ],
)
def test_adapters_that_are_not_lora_are_refused(config: Any, kind: str, model_folder: Folder, tmp_path: Path) -> None:
    adapter = write_adapter(model_folder("llama"), tmp_path, config)
    with pytest.raises(UserError, match=f"of the kind {kind}: expected LoRA"):
        embedded(model_folder("llama"), lora=LoraOptions(adapter=str(adapter)))


# -- generation settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 0.6, "do_sample": False},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    ],
)
def test_generation_settings_that_contradict_each_other_can_be_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    """`transformers` reads them, but before version 5.22 refuses to write them."""
    folder = tiny.write(tmp_path / "model", *tiny.ARCHITECTURES["llama"])
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": list(tiny.STOPS), **settings}), encoding="utf-8")
    engine = embedded(folder)
    (tmp_path / "state").mkdir()
    asyncio.run(engine.learner.save_state(tmp_path / "state"))
    again = embedded(tmp_path / "state" / "model")
    assert again.stop_tokens == engine.stop_tokens == frozenset(tiny.STOPS)


# -- the end of a turn ------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEXT_ROLE = (  # like GLM
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (  # like Llama 2
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (NEXT_ROLE, "<|user|>"), (INST, "</s>"), (PLAIN, None)]
)
@pytest.mark.parametrize("special", [True, False])
def test_templates_end_of_turn_is_a_stop_token(template: str, end: str | None, special: bool, tmp_path: Path) -> None:
    """For base models too, which know only the end of a document."""
    folder = tiny.write(tmp_path, *tiny.ARCHITECTURES["llama"])
    (folder / "generation_config.json").unlink()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    marks = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<s>", "</s>", "[INST]"]
    # In place of others: the model has no room for more.
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in marks])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = config["eos_token_id"]
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    expected = {tokenizer.convert_tokens_to_ids(mark) for mark in ("<|endoftext|>", end) if mark}
    assert embedded(folder).stop_tokens >= expected
    assert len(embedded(folder).stop_tokens - expected) <= 1  # the configuration's
