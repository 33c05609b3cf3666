"""Out of memory: smaller forward passes with the same result, otherwise one line that says what to change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.tiny import DATA, embedded, sample_all, torch_engine, train, view
from skillsd.engines.base import Engine, SampleRequest, TokenSequence
from skillsd.engines.conformance.kit import WEIGHTED
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch.forward import Network
from skillsd.engines.torch.models import load_model
from skillsd.errors import EngineFailedError
from skillsd.metrics import Mean

Folder = Callable[[str], Path]


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory ...")


def limit_passes(monkeypatch: pytest.MonkeyPatch, tokens: int, *, backward: bool = False) -> list[int]:
    """Let forward passes of more than so many tokens fail, or their backward passes half-way; returns all sizes."""
    compute = Network.forward
    sizes: list[int] = []

    def forward(self: Network, sequences: Sequence[TokenSequence], *args: Any) -> tuple[Tensor, ...]:
        sizes.append(sum(len(s.tokens) for s in sequences))
        if sizes[-1] <= tokens:
            return compute(self, sequences, *args)
        if not backward:
            no_memory()
        model: Any = self.run
        layer = model.get_base_model().model.layers[0] if hasattr(model, "peft_config") else model.model.layers[0]
        # The layers after the first have their gradient by then.
        hook = layer.register_forward_hook(lambda _, __, out: out.register_hook(lambda _: no_memory()) and None)
        try:
            return compute(self, sequences, *args)
        finally:
            hook.remove()

    monkeypatch.setattr(Network, "forward", forward)
    return sizes


def gradients(engine: Engine) -> list[Tensor]:
    """Of two calls without a step between them."""
    batch = DATA.batch()
    for part in (batch[:1], batch[1:]):
        asyncio.run(engine.learner.forward_backward(part, WEIGHTED))
    return [torch.zeros(()) if m.grad is None else m.grad for m in torch_engine(engine).optimiser.masters]


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"lora": LoraOptions(rank=4)}])
@pytest.mark.parametrize("backward", [False, True])
def test_gradient_after_a_failed_pass(
    backward: bool, options: dict[str, Any], model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    expected = gradients(embedded(model_folder("llama"), micro_batch_tokens=1, **options))
    torch.manual_seed(0)
    engine = embedded(model_folder("llama"), **options)
    longest = max(len(item.sequence.tokens) for item in DATA.batch())
    sizes = limit_passes(monkeypatch, longest, backward=backward)
    found = gradients(engine)
    assert max(sizes) > longest
    tolerance = 1e-5 if options.get("dtype") != "bfloat16" else 0.02 * max(g.abs().max().item() for g in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=tolerance)
    assert sum(g.abs().sum() for g in expected) > 0
    failures = sum(size > longest for size in sizes)
    gradients(engine)  # the lower limit is kept
    assert sum(size > longest for size in sizes) == failures


def test_metrics_after_a_failed_pass_count_each_token_once(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = asyncio.run(embedded(model_folder("llama")).learner.forward_backward(DATA.batch(), WEIGHTED))
    engine = embedded(model_folder("llama"))
    limit_passes(monkeypatch, max(len(item.sequence.tokens) for item in DATA.batch()), backward=True)
    found = asyncio.run(engine.learner.forward_backward(DATA.batch(), WEIGHTED))
    assert found.keys() == expected.keys()
    for name, metric in found.items():
        assert isinstance(metric, Mean)
        assert metric.count == expected[name].count  # type: ignore[union-attr]


def test_log_probs_after_a_failed_pass(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedded(model_folder("llama"))
    expected = view(engine)
    sizes = limit_passes(monkeypatch, max(len(s.tokens) for s in DATA.sequences()))
    torch.testing.assert_close(view(engine), expected, rtol=0, atol=1e-5)
    assert len(sizes) > 2


def test_a_sequence_that_does_not_fit_alone_is_one_line(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedded(model_folder("llama"))
    limit_passes(monkeypatch, 1)
    with pytest.raises(EngineFailedError, match=r"out of memory while scoring\. Lower training\.micro") as caught:
        view(engine)
    assert "rollout.trajectory_tokens" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineFailedError, match=r"while computing gradients\. .*model\.gradient_checkpointing=true"):
        train(engine)


def test_update(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedded(model_folder("llama"))
    monkeypatch.setattr(torch_engine(engine).optimiser.adamw, "step", no_memory)
    with pytest.raises(EngineFailedError, match=r"out of memory while updating the weights\. Set model\.lora"):
        train(engine)


@pytest.mark.parametrize("text", ["CUDA out of memory.", "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
def test_sampling(text: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedded(model_folder("llama"))
    requests = [SampleRequest(tokens=tuple(DATA.ids(8, i)), max_tokens=6, seed=i) for i in range(3)]
    expected = sample_all(engine, requests)

    def decode(*args: Any) -> None:
        raise RuntimeError(text)

    with monkeypatch.context() as patch:
        patch.setattr(Network, "decode", decode)
        with pytest.raises(EngineFailedError, match=r"out of memory while sampling\. Lower rollout\.concurrency"):
            sample_all(engine, requests)
    assert sample_all(engine, requests) == expected


def test_loading(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_, **__: no_memory())
    with pytest.raises(EngineFailedError, match=r"out of memory while loading the model\. Set model\.dtype=bfloat16"):
        load_model(str(model_folder("llama")), dtype="float32", device=torch.device("cpu"))


def test_other_errors_are_not_taken_for_it(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedded(model_folder("llama"))

    def forward(*args: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Network, "forward", forward)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        view(engine)
    assert not isinstance(caught.value, EngineFailedError)
