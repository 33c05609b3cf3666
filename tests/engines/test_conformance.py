"""The embedded engine keeps the contract, with many architectures and options; and what is its own."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
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

from engines import tiny
from engines.tiny import (
    DATA,
    chosen,
    conforms,
    distribution,
    embedded,
    marked_all,
    sample_all,
    torch_engine,
    train,
    view,
)
from skillsd.engines.base import Engine, SampleRequest, StaleTeacherError, TokenSequence, TrainItem, WeightsHandle
from skillsd.engines.conformance import CHECKS, OF_ARCHITECTURE, Check, Subject, learning, sampling
from skillsd.engines.conformance.kit import WEIGHTED, gap
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch import attention
from skillsd.engines.torch.options import TorchOptions
from skillsd.errors import UserError
from skillsd.objective import WHOLE, top_k

Folder = Callable[[str], Path]

LORA = {"lora": LoraOptions(rank=4, alpha=8)}

SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in tiny.ARCHITECTURES},
    "llama-lora": ("llama", LORA),
    "llama-bf16": ("llama", {"dtype": "bfloat16"}),
    "llama-static": ("llama", {"decode": "static"}),
    "gpt2-checkpointed": ("gpt2", {"gradient_checkpointing": True}),
    "qwen3-lora-bf16-checkpointed": ("qwen3", {**LORA, "dtype": "bfloat16", "gradient_checkpointing": True}),
}
EVERY_CHECK = ("llama", "llama-lora", "llama-bf16", "llama-static")
"""These go through every check, the others through those that depend on the architecture."""

CASES = [
    (name, check)
    for name in SUBJECTS
    for check in (CHECKS if name in EVERY_CHECK else (*OF_ARCHITECTURE, sampling.teacher_is_sampled))
]
CASES.append(("qwen3-lora-bf16-checkpointed", learning.restored_state_goes_on_bit_for_bit))

# Eight bits of mantissa: two ways to compute a log-prob of about -5 differ by a few hundredths, a gradient's norm by a
# few per cent, and sampling can pick another token near a boundary when the batch changes.
BFLOAT16 = {"tolerance": 0.15, "relative": 0.03, "batch_invariant": False}


Engines = Callable[[str], Subject]


@pytest.fixture(scope="module")
def subject_of(model_folder: Folder) -> Engines:
    def subject(name: str) -> Subject:
        architecture, options = SUBJECTS[name]
        folder = model_folder(architecture)
        plain = tiny.Plain(folder, options.get("dtype", "float32"))
        exactness: dict[str, Any] = BFLOAT16 if "dtype" in options else {}

        def make(*, snapshot_teacher: bool = False, micro_batch_tokens: int = 8192) -> Engine:
            torch.manual_seed(1)  # adapters begin at random
            return embedded(
                folder, **options, teacher_follows=not snapshot_teacher, micro_batch_tokens=micro_batch_tokens
            )

        return Subject(make, plain.logprobs, **exactness)

    return subject


@pytest.mark.parametrize(("name", "check"), CASES, ids=[f"{name}-{check.__name__}" for name, check in CASES])
def test_engine_conforms(name: str, check: Check, subject_of: Engines) -> None:
    conforms(check, subject_of(name))


def test_no_check_is_skipped_for_want_of_a_capability() -> None:
    missing = {name for name, there in dataclasses.asdict(TorchOptions.capabilities).items() if not there}
    assert missing == {"concurrent"}  # it samples before it trains; its check runs without it


# -- which models ----------------------------------------------------------------------------------------------------

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
        embedded(tmp_path)


def test_wrong_attention_is_refused(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With either plan: one that hides a key which should be seen is noticed before anything is trained with it."""
    for plan in (attention.PackedPlan, attention.CachedPlan):
        with monkeypatch.context() as patch:
            attend = plan.attend
            patch.setattr(plan, "attend", lambda *args, attend=attend: attend(*args[:-1], 2))
            with pytest.raises(UserError, match="differ from those of its own attention"):
                embedded(model_folder("llama"))


def test_length_is_limited_where_rotary_positions_depend_on_it(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    options = {**tiny.GROUPED, "max_position_embeddings": 128, "original_max_position_embeddings": 32}
    options |= {"rope_parameters": rope, "eos_token_id": None}
    assert embedded(tiny.write(tmp_path, "Phi3", options)).max_length == 32


# -- scoring and training --------------------------------------------------------------------------------------------


def test_temperature_applies_to_distributions_and_candidates(model_folder: Folder) -> None:
    folder = model_folder("llama")
    engine, plain, sequence = embedded(folder), tiny.Plain(folder), marked_all(DATA.ids(20, 0))
    expected = plain.logprobs(sequence.tokens, 0.5)[:-1]
    [scored] = chosen(engine, [sequence], temperature=0.5)
    for want in (WHOLE, top_k(5)):
        [found] = asyncio.run(engine.learner.logprobs([sequence], temperature=0.5, want=want))
        ids = torch.arange(expected.shape[1]).expand_as(expected) if found.candidates is None else found.candidates
        assert found.distribution is not None
        assert found.distribution.dtype == torch.float32
        assert torch.equal(found.chosen, scored)
        assert gap(found.distribution[:, : ids.shape[1]], expected.gather(1, ids)) < 2e-5


def test_checkpointed_gradient_is_the_plain_one(model_folder: Folder) -> None:
    """Even of a model with dropout, which training mode would switch on."""
    reports = []
    for checkpointing in (False, True):
        engine = embedded(model_folder("gpt2"), gradient_checkpointing=checkpointing)
        with _count_layer_passes() as passes:
            reports += train(engine)
        assert len(passes) == (4 if checkpointing else 2)  # two layers, each computed again for the backward pass
    assert reports[0] == reports[1]


@contextmanager
def _count_layer_passes() -> Iterator[list[None]]:
    passes: list[None] = []
    attend = attention.PackedPlan.attend

    def counted(self: attention.PackedPlan, *args: Any) -> Tensor:
        passes.append(None)
        return attend(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.PackedPlan, "attend", counted)
        yield passes


def test_lm_head_runs_only_at_marked_tokens(model_folder: Folder) -> None:
    engine = embedded(model_folder("llama"))
    rows: list[int] = []
    model: Any = torch_engine(engine).model
    model.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))
    sequences = [TokenSequence(tuple(range(30, 60)), (*[False] * 28, True, True)) for _ in range(3)]
    chosen(engine, sequences)
    batch = [TrainItem(s, {"weight": torch.ones(2)}) for s in sequences]
    asyncio.run(engine.learner.forward_backward(batch, WEIGHTED))
    assert [count for count in rows if count] == [6, 6]


@pytest.mark.parametrize("in_thread", [False, True])
def test_event_loop_is_free_while_a_thread_computes(in_thread: bool, model_folder: Folder) -> None:
    """And the result is the same."""
    engine, sequences = embedded(model_folder("llama"), in_thread=in_thread), DATA.sequences()

    async def run() -> tuple[list[Any], bool]:
        other = asyncio.ensure_future(asyncio.sleep(0))
        scores = await engine.learner.logprobs(sequences)
        return scores, other.done()

    scores, other_ran = asyncio.run(run())
    assert other_ran == in_thread
    for score, expected in zip(scores, chosen(embedded(model_folder("llama")), sequences), strict=True):
        assert torch.equal(score.chosen, expected)


# -- the teacher -----------------------------------------------------------------------------------------------------


def test_following_teacher_is_sampled_as_the_student_and_never_averaged(model_folder: Folder) -> None:
    engine = embedded(model_folder("llama"))
    with pytest.raises(ValueError, match="rate"):
        asyncio.run(engine.learner.sync_teacher(0.5))
    request = SampleRequest(DATA.ids(5, 0), 4, seed=0)
    train(engine)
    with pytest.raises(StaleTeacherError):
        sample_all(engine, [replace(request, weights="teacher")])
    asyncio.run(engine.learner.sync_teacher())
    student, teacher = sample_all(engine, [request, replace(request, weights="teacher")])
    assert student == teacher


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_averaged_teacher_is_the_average_of_the_weights(dtype: str, model_folder: Folder) -> None:
    """Of the student's float32 weights, whatever the dtype of the model; rounded once, at the end."""
    engine = embedded(model_folder("llama"), dtype=dtype, teacher_follows=False)
    learner = torch_engine(engine)
    expected = [master.detach().double() for master in learner.optimiser.masters]
    for rate in [1e-3] * 40 + [0.3]:
        train(engine, learning_rate=1e-4)
        asyncio.run(learner.sync_teacher(rate))
        masters = learner.optimiser.masters
        expected = [(1 - rate) * e + rate * m.detach() for e, m in zip(expected, masters, strict=True)]
    assert learner.teacher is not None
    for weight, average in zip(learner.teacher.values(), expected, strict=True):
        assert weight.dtype == getattr(torch, dtype)
        limit = 1e-6 if dtype == "float32" else 2**-8
        assert ((weight - average).abs() <= limit * average.abs() + 1e-7).all()


@pytest.mark.parametrize("options", [{}, LORA, {"teacher_follows": False}], ids=["full", "lora", "snapshot"])
def test_external_teacher_is_the_other_model(options: dict[str, Any], model_folder: Folder, tmp_path: Path) -> None:
    """Whatever happens to the student, its scores and samples are those of the other model alone."""
    folder, other = model_folder("llama"), model_folder("qwen3")
    alone = embedded(other)
    expected = view(alone)

    def make() -> Engine:
        return embedded(folder, teacher_model=str(other), **options)

    engine = make()
    requests = [SampleRequest(DATA.ids(9, n), 6, seed=n, session=str(n)) for n in range(3)]
    samples = [(sample.tokens, sample.logprobs) for sample in sample_all(alone, requests)]
    for rate in (1.0, 0.5):
        train(engine, 2)
        assert torch.equal(view(engine, "teacher"), expected)
        of_teacher = sample_all(engine, [replace(request, weights="teacher") for request in requests])
        assert [(sample.tokens, sample.logprobs) for sample in of_teacher] == samples
        for request in requests:
            engine.sampler.end_session(request.session or "")
        asyncio.run(engine.learner.sync_teacher(rate))
        assert torch.equal(view(engine, "teacher"), expected)
    with pytest.raises(ValueError, match="rate"):
        asyncio.run(engine.learner.sync_teacher(2.0))
    assert gap(view(engine), expected) > 0.1

    asyncio.run(engine.learner.save_state(tmp_path))
    assert torch.load(tmp_path / "engine.pt", weights_only=True)["teacher"] is None
    resumed = make()
    asyncio.run(resumed.load_state(tmp_path))
    assert torch.equal(view(resumed, "teacher"), expected)
    assert train(resumed, 2) == train(engine, 2)
    assert torch.equal(view(resumed), view(engine))


def test_external_teacher_may_be_a_checkpoint(model_folder: Folder, tmp_path: Path) -> None:
    trained = embedded(model_folder("llama"))
    train(trained, 2)
    asyncio.run(trained.learner.save_state(tmp_path))
    engine = embedded(model_folder("llama"), teacher_model=str(tmp_path / "model"))
    assert torch.equal(view(engine, "teacher"), view(trained))


def test_external_teacher_limits_the_length_and_is_cut_to_the_students_logits(
    model_folder: Folder, tmp_path: Path
) -> None:
    """Logits are padded to a round number, larger models' often to a larger one; the tokens are the same."""
    width = len(tiny.tokenizer())
    wide = tiny.write(tmp_path, "Llama", {**tiny.GROUPED, "vocab_size": width + 20, "max_position_embeddings": 100})
    engine = embedded(model_folder("llama"), teacher_model=str(wide))
    assert engine.max_length == 100
    sequence = marked_all(DATA.ids(20, 0))
    plain = tiny.Plain(wide).logits(sequence.tokens)[:-1, :width].float().log_softmax(-1)
    assert gap(distribution(engine, sequence, "teacher"), plain) < 1e-5
    request = SampleRequest(DATA.ids(9, 0), 6, seed=0, weights="teacher")
    assert max(sample_all(engine, [request])[0].tokens) < width
    with pytest.raises(UserError, match=f"{width} logits and the student {width + 20}"):
        embedded(wide, teacher_model=str(model_folder("llama")))


def test_external_teacher_with_another_tokenizer_is_refused(model_folder: Folder, tmp_path: Path) -> None:
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
            embedded(model_folder("llama"), teacher_model=str(folder))
    with pytest.raises(UserError, match="no model in"):
        embedded(model_folder("llama"), teacher_model=str(tmp_path / "nowhere"))


# -- what is saved and published -------------------------------------------------------------------------------------


def test_random_state_is_restored(model_folder: Folder, tmp_path: Path) -> None:
    engine = embedded(model_folder("llama"))
    asyncio.run(engine.learner.save_state(tmp_path))
    noise = torch.rand(3)
    asyncio.run(engine.load_state(tmp_path))
    assert torch.equal(torch.rand(3), noise)


def test_stale_teacher_is_still_stale_when_restored(model_folder: Folder, tmp_path: Path) -> None:
    engine, resumed = embedded(model_folder("llama")), embedded(model_folder("llama"))
    train(engine)
    asyncio.run(engine.learner.save_state(tmp_path))
    asyncio.run(resumed.load_state(tmp_path))
    with pytest.raises(StaleTeacherError):
        view(resumed, "teacher")


def test_checkpoint_of_another_kind_is_refused_and_changes_nothing(model_folder: Folder, tmp_path: Path) -> None:
    def make(architecture: str = "llama", **options: Any) -> Engine:
        return embedded(model_folder(architecture), **options)

    engine = make()
    train(engine)
    asyncio.run(engine.learner.save_state(tmp_path))
    for other in (make("qwen3"), make(dtype="bfloat16"), make(**LORA)):
        before = view(other)
        with pytest.raises(UserError, match="different model"):
            asyncio.run(other.load_state(tmp_path))
        assert torch.equal(view(other), before)
        assert other.learner.version == 0
    with pytest.raises(UserError, match="no teacher"):
        asyncio.run(make(teacher_follows=False).load_state(tmp_path))
    asyncio.run(engine.learner.sync_teacher())
    asyncio.run(engine.learner.save_state(tmp_path))
    snapshot = make(teacher_follows=False)
    asyncio.run(snapshot.load_state(tmp_path))  # right after a sync a following teacher is the student: nothing missing
    assert torch.equal(view(snapshot, "teacher"), view(engine))
    with pytest.raises(UserError, match=r"engine\.pt"):
        asyncio.run(engine.load_state(tmp_path / "nowhere"))
    (tmp_path / "engine.pt").write_bytes(b"half a checkp")
    with pytest.raises(UserError, match="damaged"):
        asyncio.run(engine.load_state(tmp_path))


def test_saved_model_loads_with_transformers(model_folder: Folder, tmp_path: Path) -> None:
    """A plain `from_pretrained` gives the trained model, with its own attention."""
    engine = embedded(model_folder("llama"))
    train(engine)
    asyncio.run(engine.learner.save_state(tmp_path))
    sequence = marked_all(DATA.ids(20, 0))
    plain = tiny.Plain(tmp_path / "model").logprobs(sequence.tokens)
    assert gap(distribution(engine, sequence), plain[:-1]) < 1e-5
    again = embedded(tmp_path / "model")
    assert torch.equal(view(again), view(engine))
    assert again.stop_tokens == engine.stop_tokens == frozenset(tiny.STOPS)


def test_weights_of_another_learner_or_version_are_not_loaded(model_folder: Folder) -> None:
    """The sampler is the learner: it has no weights but its own."""
    engine = embedded(model_folder("llama"))
    for handle in (WeightsHandle(0, "/some/folder"), WeightsHandle(1)):
        with pytest.raises(ValueError, match="its own weights"):
            asyncio.run(engine.sampler.load(handle))
    asyncio.run(engine.publish())
