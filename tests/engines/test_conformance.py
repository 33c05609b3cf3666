"""The embedded engine keeps the contract: full weights and LoRA, float32 and bfloat16, many architectures."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from engines import conformance, tiny
from engines.conformance import CHECKS, OF_ARCHITECTURE, Subject
from skillsd.engines.base import SampleRequest, TokenSequence, TrainItem
from skillsd.engines.torch import attention
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.models import LoraOptions
from skillsd.errors import UserError

LORA = {"lora": LoraOptions(rank=4, alpha=8.0)}

SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in tiny.ARCHITECTURES},
    "llama-lora": ("llama", LORA),
    "llama-bf16": ("llama", {"dtype": "bfloat16"}),
    "gpt2-checkpointed": ("gpt2", {"gradient_checkpointing": True}),
    "qwen3-lora-bf16-checkpointed": ("qwen3", {**LORA, "dtype": "bfloat16", "gradient_checkpointing": True}),
}
WHOLE = ("llama", "llama-lora", "llama-bf16")
"""These go through every check, the other architectures through those that depend on one."""

PAIRS = [(name, check) for name in SUBJECTS for check in (CHECKS if name in WHOLE else OF_ARCHITECTURE)]

# Eight bits of mantissa: two ways to compute a log-prob of about -5 differ by a few hundredths, the sum of a gradient
# by per cents, and a token near a boundary is another one in other company.
BFLOAT16 = {"tolerance": 0.15, "relative": 0.03, "batch_invariant": False}


Engines = Callable[[str], Subject]


@pytest.fixture(scope="module")
def subject_of(model_folder: Callable[[str], Path]) -> Engines:
    def subject(name: str) -> Subject:
        architecture, options = SUBJECTS[name]
        folder = model_folder(architecture)
        plain = tiny.Plain(folder, options.get("dtype", "float32"))
        exactness: dict[str, Any] = BFLOAT16 if "dtype" in options else {}

        def make(**more: Any) -> TorchEngine:
            torch.manual_seed(1)  # adapters begin at random
            return TorchEngine(str(folder), device="cpu", **options, **more)

        return Subject(make, plain.logprobs, **exactness)

    return subject


@pytest.mark.parametrize(("name", "check"), PAIRS, ids=[f"{name}-{check.__name__}" for name, check in PAIRS])
def test_contract(name: str, check: Callable[[Subject], None], subject_of: Engines) -> None:
    check(subject_of(name))


@pytest.mark.parametrize("name", [*WHOLE, "qwen3-lora-bf16-checkpointed"])
def test_saved_and_loaded_goes_on_bit_for_bit(name: str, subject_of: Engines, tmp_path: Path) -> None:
    conformance.saved_and_loaded_goes_on_bit_for_bit(subject_of(name), tmp_path)


# -- what is this engine's own --------------------------------------------------------------------------------------

UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "soft cap": ("Gemma2", {**tiny.GROUPED, "attn_logit_softcapping": 50.0}, "softcap"),
    "sinks": (
        "GptOss",
        {
            **tiny.GROUPED,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "s_aux",
    ),
    # At its usual tiny weights its convolution changes log-probs by less than rounding would be allowed to.
    "convolutions": (
        "Lfm2",
        {**tiny.GROUPED, "initializer_range": 0.02, "layer_types": ["conv", "full_attention"]},
        "conv",
    ),
    "recurrence": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "supported"),
    "bias by distance": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "attention interface"),
    "attention of its own": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "AttentionInterface",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_architecture_is_refused(name: str, tmp_path: Path) -> None:
    kind, options, words = UNSUPPORTED[name]
    tiny.write(tmp_path, kind, options)
    with pytest.raises(UserError, match=words):
        TorchEngine(str(tmp_path), device="cpu")


def test_wrong_attention_is_refused(model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Either plan: one that hides a key it should show is noticed before anything is trained with it."""
    for plan in (attention.PackedPlan, attention.CachedPlan):
        with monkeypatch.context() as patch:
            attend = plan.attend
            patch.setattr(plan, "attend", lambda *args, attend=attend: attend(*args[:-1], 2))
            with pytest.raises(UserError, match="does not say the same"):
                TorchEngine(str(model_folder("llama")), device="cpu")


def test_rotary_positions_that_change_with_length_are_kept_below_the_change(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    options = {**tiny.GROUPED, "max_position_embeddings": 128, "original_max_position_embeddings": 32}
    options |= {"rope_parameters": rope, "eos_token_id": None}
    engine = TorchEngine(str(tiny.write(tmp_path, "Phi3", options)), device="cpu")
    assert engine.max_length == 32


def test_checkpointed_gradient_is_the_plain_one(model_folder: Callable[[str], Path]) -> None:
    """Even of a model with dropout, which training mode would switch on."""
    reports = []
    for checkpointing in (False, True):
        engine = TorchEngine(str(model_folder("gpt2")), device="cpu", gradient_checkpointing=checkpointing)
        with _count_layer_passes(engine) as passes:
            reports.append(conformance._train(engine)[0])
        assert len(passes) == (4 if checkpointing else 2)  # two layers, each computed again on the way back
    assert reports[0] == reports[1]


@contextmanager
def _count_layer_passes(engine: TorchEngine) -> Iterator[list[None]]:
    passes: list[None] = []
    attend = attention.PackedPlan.attend

    def counted(self: attention.PackedPlan, *args: Any) -> Tensor:
        passes.append(None)
        return attend(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.PackedPlan, "attend", counted)
        yield passes


def test_lm_head_runs_only_where_a_token_was_sampled(model_folder: Callable[[str], Path]) -> None:
    engine = TorchEngine(str(model_folder("llama")), device="cpu")
    rows: list[int] = []
    engine.model.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))  # type: ignore[union-attr, operator]
    sequences = [TokenSequence(tuple(range(30, 60)), (*[False] * 28, True, True)) for _ in range(3)]
    engine.score(sequences)
    engine.forward_backward([TrainItem(s, {"weight": torch.ones(2)}) for s in sequences], conformance._weighted)
    assert [count for count in rows if count] == [6, 6]


def test_checkpoint_of_another_kind_is_refused_and_changes_nothing(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def make(architecture: str = "llama", **options: Any) -> TorchEngine:
        return TorchEngine(str(model_folder(architecture)), device="cpu", **options)

    engine = make()
    conformance._train(engine)
    engine.save(tmp_path)
    for other in (make("qwen3"), make(dtype="bfloat16"), make(**LORA)):
        before = conformance._view(other)
        with pytest.raises(UserError, match="other weights"):
            other.load(tmp_path)
        assert torch.equal(conformance._view(other), before)
    with pytest.raises(UserError, match="no teacher"):
        make(teacher_follows=False).load(tmp_path)
    engine.sync_teacher()
    engine.save(tmp_path)
    snapshot = make(teacher_follows=False)
    snapshot.load(tmp_path)  # at this moment the following teacher is the student: nothing is missing
    assert torch.equal(conformance._view(snapshot, "teacher"), conformance._view(engine))
    with pytest.raises(UserError, match=r"engine\.pt"):
        engine.load(tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_averaged_teacher_is_the_average_of_the_weights(dtype: str, model_folder: Callable[[str], Path]) -> None:
    """Of the student's float32 weights, whatever the dtype that it computes in; its own is rounded once, at the end."""
    engine = TorchEngine(str(model_folder("llama")), device="cpu", dtype=dtype, teacher_follows=False)
    expected = [master.detach().double() for master in engine._optimiser.masters]
    for rate in [1e-3] * 40 + [0.3]:
        conformance._train(engine, learning_rate=1e-4)
        engine.sync_teacher(rate)
        masters = engine._optimiser.masters
        expected = [(1 - rate) * e + rate * m.detach() for e, m in zip(expected, masters, strict=True)]
    assert engine._teacher is not None
    for weight, average in zip(engine._teacher.values(), expected, strict=True):
        assert weight.dtype == getattr(torch, dtype)
        limit = 1e-6 if dtype == "float32" else 2**-8
        assert ((weight - average).abs() <= limit * average.abs() + 1e-7).all()


# -- a teacher that is another model --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, LORA, {"teacher_follows": False}], ids=["full", "lora", "snapshot"])
def test_external_teacher_is_the_other_model(
    options: dict[str, Any], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever happens to the student: its scores and samples are those of the other model by itself."""
    folder, other = str(model_folder("llama")), str(model_folder("qwen3"))
    alone = TorchEngine(other, device="cpu")
    expected = conformance._view(alone)

    def make() -> TorchEngine:
        return TorchEngine(folder, device="cpu", teacher_model=other, **options)

    engine = make()
    requests = [SampleRequest(conformance._ids(9, n), 6, seed=n, session=str(n)) for n in range(3)]
    samples = conformance._sample_all(alone, requests)
    for rate in (1.0, 0.5):
        conformance._train(engine, 2)
        assert torch.equal(conformance._view(engine, "teacher"), expected)
        of_teacher = [replace(request, weights="teacher") for request in requests]
        assert conformance._sample_all(engine, of_teacher) == samples
        for request in requests:
            engine.end_session(request.session or "")
        engine.sync_teacher(rate)
        assert torch.equal(conformance._view(engine, "teacher"), expected)
    with pytest.raises(ValueError, match="rate"):
        engine.sync_teacher(2.0)
    assert conformance._gap(conformance._view(engine), expected) > 0.1

    engine.save(tmp_path)
    assert torch.load(tmp_path / "engine.pt", weights_only=True)["teacher"] is None
    resumed = make()
    resumed.load(tmp_path)
    assert torch.equal(conformance._view(resumed, "teacher"), expected)
    assert conformance._train(resumed, 2) == conformance._train(engine, 2)
    assert torch.equal(conformance._view(resumed), conformance._view(engine))


def test_external_teacher_may_be_a_checkpoint(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    trained = TorchEngine(str(model_folder("llama")), device="cpu")
    conformance._train(trained, 2)
    trained.save(tmp_path)
    engine = TorchEngine(str(model_folder("llama")), device="cpu", teacher_model=str(tmp_path / "model"))
    assert torch.equal(conformance._view(engine, "teacher"), conformance._view(trained))


def test_external_teacher_shortens_the_sequences_and_is_cut_to_the_students_logits(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Logits are padded to a round number, larger models' often to a larger one; the tokens are the same."""
    width = len(tiny.tokenizer())
    wide = tiny.write(tmp_path, "Llama", {**tiny.GROUPED, "vocab_size": width + 20, "max_position_embeddings": 100})
    engine = TorchEngine(str(model_folder("llama")), device="cpu", teacher_model=str(wide))
    assert engine.max_length == 100
    sequence = TokenSequence(conformance._ids(20, 0), (False, *[True] * 19))
    seen = engine.score([sequence], "teacher", distribution=True)[0]
    plain = tiny.Plain(wide).logits(sequence.tokens)[:-1, :width].float().log_softmax(-1)
    assert conformance._gap(seen, plain) < 1e-5
    request = SampleRequest(conformance._ids(9, 0), 6, seed=0, weights="teacher")
    assert max(conformance._sample_all(engine, [request])[0].tokens) < width
    with pytest.raises(UserError, match=f"{width} logits and the student {width + 20}"):
        TorchEngine(str(wide), device="cpu", teacher_model=str(model_folder("llama")))


def test_external_teacher_that_reads_other_tokens_is_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def changed(what: str) -> Path:
        return shutil.copytree(model_folder("llama"), tmp_path / what)

    vocabulary, stops, template = changed("vocabulary"), changed("stop tokens"), changed("template")
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(vocabulary)
    GenerationConfig(eos_token_id=list(tiny.STOPS[:-1]), pad_token_id=0).save_pretrained(stops)
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(template)
    for folder, words in ((vocabulary, "vocabulary"), (stops, "ends its turns"), (template, "chat template")):
        with pytest.raises(UserError, match=words):
            TorchEngine(str(model_folder("llama")), device="cpu", teacher_model=str(folder))
    with pytest.raises(UserError, match="no model in"):
        TorchEngine(str(model_folder("llama")), device="cpu", teacher_model=str(tmp_path / "nowhere"))


# -- what is saved --------------------------------------------------------------------------------------------------


def test_saved_model_is_in_the_ecosystems_format(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Anyone's `from_pretrained` gives the trained model, with attention of its own."""
    engine = TorchEngine(str(model_folder("llama")), device="cpu")
    conformance._train(engine)
    engine.save(tmp_path)
    tokens = conformance._ids(20, 0)
    plain = tiny.Plain(tmp_path / "model").logprobs(tokens)
    scored = engine.score([TokenSequence(tokens, (False, *[True] * 19))], distribution=True)[0]
    assert conformance._gap(scored, plain[:-1]) < 1e-5
    again = TorchEngine(str(tmp_path / "model"), device="cpu")
    assert torch.equal(conformance._view(again), conformance._view(engine))
    assert again.stop_tokens == engine.stop_tokens == frozenset(tiny.STOPS)
