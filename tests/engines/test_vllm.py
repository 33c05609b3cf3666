"""Rollouts by vLLM: what can be tested without vLLM, then (slow) vLLM itself, where `make vllm-env` has put it."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engines import conformance, tiny
from engines.conformance import CHECKS, Subject
from skillsd.engines.base import SampleRequest, TokenSequence
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.models import LoraOptions
from skillsd.engines.vllm import engine as module
from skillsd.engines.vllm.client import WorkerClient, EngineFailedError
from skillsd.engines.vllm.engine import VllmEngine, VllmOptions, export_weights
from skillsd.engines.vllm.worker import Worker
from skillsd.errors import UserError

PYTHON = Path(__file__).parents[2] / "build" / "vllm" / "bin" / "python"
"""Where `make vllm-env` puts it."""

needs_vllm = pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM in {PYTHON.parents[1]}: make vllm-env")

SIZES = {**tiny.GROUPED, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""vLLM's kernels for a CPU take heads of 32 and some multiples."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings tied to the head: the layer that stays old if one is not careful."""
    return tiny.write(tmp_path_factory.mktemp("tied"), "Llama", {**SIZES, "tie_word_embeddings": True})


# -- without vLLM ---------------------------------------------------------------------------------------------------

ECHO = """
import json, sys
options = json.loads(sys.stdin.readline())
print(json.dumps({"ready": "0"}), flush=True)
for line in sys.stdin:
    message = json.loads(line)
    print(message.keys(), file=sys.stderr, flush=True)
    if "tokens" in message:
        if message["tokens"][-1] == 99: sys.exit("something broke")
        if message["tokens"][-1] == 98: continue
        if message["tokens"][-1] == 97:
            print(json.dumps({"id": message["id"], "error": "too long"}), flush=True)
            continue
        print(json.dumps({"id": message["id"], "tokens": [7], "logprobs": [-0.5], "stop": "length"}), flush=True)
    elif "weights" in message:
        print(json.dumps({"id": message["id"]}), flush=True)
"""


@pytest.fixture
def echo(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[VllmEngine]:
    """An engine whose worker always says 7."""
    script = tmp_path / "worker.py"
    script.write_text(ECHO)
    monkeypatch.setattr(module, "WorkerClient", functools.partial(WorkerClient, worker=script))
    options = VllmOptions(timeout_seconds=20, max_model_len=getattr(request, "param", None))
    engine = VllmEngine(TorchEngine(str(folder), device="cpu"), options)
    yield engine
    engine.close()


def sample(engine: VllmEngine, *tokens: int, **more: Any) -> Any:
    return asyncio.run(engine.sample(SampleRequest(tokens, 4, seed=1, **more)))


def asked(engine: VllmEngine) -> list[str]:
    """What the worker was asked for so far."""
    return ["weights" if "weights" in line else "tokens" for line in engine._worker.last_words(99).splitlines()]


def assert_is_written(engine: Any, folder: Path) -> None:
    """`folder` holds the student, as a model whose head is not tied to its embeddings."""
    plain = tiny.Plain(folder)
    model: Any = plain.model
    assert not model.config.tie_word_embeddings
    model.lm_head.weight.data.copy_(load_file(folder / "head.safetensors")["lm_head.weight"])
    tokens = conformance._ids(20, 0)
    scored = engine.score([TokenSequence(tokens, (False, *[True] * 19))], distribution=True)[0]
    assert conformance._gap(scored, plain.logprobs(tokens)[:-1]) < 1e-5


def test_weights_are_given_once_after_an_update_and_before_the_next_sample(echo: VllmEngine, tmp_path: Path) -> None:
    assert sample(echo, 40, 41).tokens == (7,)
    conformance._train(echo, 2)
    assert asked(echo) == ["tokens"]
    sample(echo, 40)
    sample(echo, 40)
    assert asked(echo) == ["tokens", "weights", "tokens", "tokens"]
    echo.save(tmp_path)
    echo.load(tmp_path)
    sample(echo, 40)
    assert asked(echo)[4:] == ["weights", "tokens"]
    assert_is_written(echo, echo._folder)


def test_update_that_is_refused_gives_no_weights(echo: VllmEngine) -> None:
    sample(echo, 40)
    echo.forward_backward(conformance._batch(), lambda p, signals: (p.chosen.sum() * float("nan"), {}))
    assert not echo.step(1e-3).applied
    sample(echo, 40)
    assert asked(echo) == ["tokens", "tokens"]


def test_request_that_does_not_extend_its_session_is_refused(echo: VllmEngine) -> None:
    sample(echo, 40, 41, session="a")
    with pytest.raises(ValueError, match="extend"):
        sample(echo, 40, 41, 8, session="a")
    sample(echo, 40, 41, 7, 50, session="a")
    echo.end_session("a")
    sample(echo, 50, session="a")


@pytest.mark.parametrize("echo", [16], indirect=True)
def test_limit_of_what_is_sampled_is_none_of_what_is_scored(echo: VllmEngine) -> None:
    assert echo.max_length == echo.trainer.max_length > 16
    assert echo._llm_options()["max_model_len"] == 16
    assert sample(echo, *[40] * 12).tokens == (7,)  # and 4 more are asked for
    with pytest.raises(ValueError, match=r"17 tokens.*at most 16 \(engine\.max_model_len\)"):
        sample(echo, *[40] * 13)
    assert len(echo.score([TokenSequence((40,) * 30, (False,) + (True,) * 29)])[0]) == 29


def test_what_goes_wrong_over_there_is_told(echo: VllmEngine) -> None:
    with pytest.raises(EngineFailedError, match="refused a request: too long"):
        sample(echo, 97)
    assert sample(echo, 40).tokens == (7,)  # of that request alone
    with pytest.raises(EngineFailedError, match=r"exit code 1.*\n.*(\n.*)*something broke"):
        sample(echo, 99)
    with pytest.raises(EngineFailedError, match="something broke"):  # and whoever comes later hears the same
        sample(echo, 40)


def test_worker_that_is_killed_is_an_error_for_all_who_wait(echo: VllmEngine) -> None:
    async def run() -> list[Any]:
        waiting = [asyncio.ensure_future(echo.sample(SampleRequest((40 + n, 98), 4, seed=n))) for n in range(3)]
        await asyncio.sleep(0.5)
        os.kill(echo._worker._process.pid, signal.SIGKILL)
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert all("killed by signal 9" in str(error) for error in asyncio.run(run()))


def test_silence_is_an_error(echo: VllmEngine) -> None:
    echo.options = VllmOptions(timeout_seconds=0.3)
    with pytest.raises(EngineFailedError, match=r"0\.3 s"):
        sample(echo, 98)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="this interpreter has vLLM")
def test_interpreter_that_is_missing_or_has_no_vllm(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = TorchEngine(str(folder), device="cpu")
    with pytest.raises(UserError, match=r"engine\.python.*vllm-env"):
        VllmEngine(trainer, VllmOptions(python="/nowhere/python"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *args: False)  # no /dev/shm
    with pytest.raises(UserError, match="has no vLLM"):
        VllmEngine(trainer, VllmOptions(python=sys.executable))
    assert not list(tmp_path.glob("skillsd-vllm-*"))


def test_request_that_ends_in_a_way_of_its_own_is_an_error() -> None:
    """Else whoever asked would wait for the timeout."""
    answers: list[dict[str, Any]] = []
    ended = [
        SimpleNamespace(
            finished=reason is not None,
            request_id=str(number),
            outputs=[
                SimpleNamespace(finish_reason=reason, token_ids=[7], logprobs=[{7: SimpleNamespace(logprob=-0.5)}])
            ],
        )
        for number, reason in enumerate(["stop", "error", None, "repetition"])
    ]
    llm = SimpleNamespace(llm_engine=SimpleNamespace(step=lambda: ended))
    Worker(llm, None, queue.Queue(), answers.append)._step()
    assert [answer["id"] for answer in answers] == [0, 1, 3]
    assert answers[0] == {"id": 0, "tokens": [7], "logprobs": [-0.5], "stop": "stop"}
    assert "'error'" in answers[1]["error"]
    assert "'repetition'" in answers[2]["error"]


def test_weights_that_find_no_room_are_told(folder: Path, tmp_path: Path) -> None:
    engine = TorchEngine(str(folder), device="cpu")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # a file system that is full
    try:
        with pytest.raises(UserError, match=rf"can't write the weights.*GiB\) into '{tmp_path}'.*TMPDIR"):
            export_weights(engine.model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_merged_weights_keep_their_dtype(folder: Path, tmp_path: Path) -> None:
    """Adapters are float32, and what is added up with them is."""
    engine = TorchEngine(str(folder), device="cpu", dtype="bfloat16", lora=LoraOptions(rank=4, alpha=8))
    conformance._train(engine, 2)
    export_weights(engine.model, tmp_path)
    for file in ("model.safetensors", "head.safetensors"):
        assert {weight.dtype for weight in load_file(tmp_path / file).values()} == {torch.bfloat16}
    written = sum((tmp_path / file).stat().st_size for file in ("model.safetensors", "head.safetensors"))
    assert written < module._size(engine.model)


def test_adapters_of_experts_are_merged(tmp_path: Path) -> None:
    kind, sizes = tiny.ARCHITECTURES["qwen3-moe"]
    model = tiny.write(tmp_path / "moe", kind, {**sizes, "tie_word_embeddings": False})
    engine = TorchEngine(str(model), device="cpu", lora=LoraOptions(rank=2, alpha=8))
    conformance._train(engine, 3)
    export_weights(engine.model, tmp_path / "out")
    tokens = conformance._ids(20, 0)
    scored = engine.score([TokenSequence(tokens, (False, *[True] * 19))], distribution=True)[0]
    assert conformance._gap(scored, tiny.Plain(model).logprobs(tokens)[:-1]) > 1e-3
    assert conformance._gap(scored, tiny.Plain(tmp_path / "out").logprobs(tokens)[:-1]) < 1e-4


HEAD = LoraOptions(rank=4, alpha=8, target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize(
    "options", [{}, {"lora": LoraOptions(rank=4, alpha=8)}, {"lora": HEAD}], ids=["full", "lora", "lora of the head"]
)
def test_exported_weights_are_the_model_with_a_head_of_its_own(
    options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    engine = TorchEngine(str(folder), device="cpu", **options)
    conformance._train(engine, 3)
    before = conformance._view(engine)
    export_weights(engine.model, tmp_path)
    assert torch.equal(conformance._view(engine), before)
    assert_is_written(engine, tmp_path)


# -- vLLM itself ----------------------------------------------------------------------------------------------------


class Shared(VllmEngine):
    """Many engines, one after the other, on one worker: starting it takes half a minute."""

    last: VllmEngine | None = None

    async def sample(self, request: SampleRequest) -> Any:
        if Shared.last is not self:
            Shared.last, self._stale = self, True
        return await super().sample(request)


class Kept:
    """A worker that its engines can't close."""

    def __init__(self, client: WorkerClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def subject(request: pytest.FixtureRequest, folder: Path) -> Iterator[Subject]:
    dtype, client = request.param, None
    # Two cores that others use, too: threads that wait for each other would wait for long.
    threads = pytest.MonkeyPatch()
    threads.setenv("OMP_NUM_THREADS", "1")

    def make(**more: Any) -> VllmEngine:
        nonlocal client
        trainer = TorchEngine(str(folder), device="cpu", dtype=dtype, **more)
        if client is None:
            Shared.last = first = Shared(trainer, VllmOptions(python=str(PYTHON)))
            client = Kept(first._worker)
            first._close.detach()
            return first
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "WorkerClient", lambda *args: client)
            return Shared(trainer, VllmOptions(python=str(PYTHON)))

    plain = tiny.Plain(folder, dtype)
    exactness: dict[str, Any] = {"tolerance": 3e-5, "relative": 1e-4}
    if dtype == "bfloat16":
        exactness = {"tolerance": 0.3, "relative": 0.03, "batch_invariant": False}
    yield Subject(make, plain.logprobs, **exactness)
    threads.undo()
    if client is not None:
        client._client.close()


OF_SAMPLING: list[Callable[[Subject], None]] = [
    conformance.seed_determines_the_sample,
    conformance.same_request_twice_at_once,
    conformance.sampled_logprobs_are_scored_logprobs,
    conformance.bad_requests_are_refused,
    conformance.sampling_follows_the_update,
    conformance.snapshot_teacher_stays,
    conformance.following_teacher_is_never_stale,
]
"""Those that sample. The others concern the trainer alone."""

OF_TRAINER = [check for check in CHECKS if check not in OF_SAMPLING]


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("check", OF_SAMPLING, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Subject], None], subject: Subject) -> None:
    check(subject)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("check", OF_TRAINER, ids=lambda check: check.__name__)
def test_contract_of_the_trainer(check: Callable[[Subject], None], subject: Subject) -> None:
    check(subject)


@needs_vllm
@pytest.mark.slow
def test_saved_and_loaded_goes_on_bit_for_bit(subject: Subject, tmp_path: Path) -> None:
    conformance.saved_and_loaded_goes_on_bit_for_bit(subject, tmp_path)


@needs_vllm
@pytest.mark.slow
def test_no_layer_stays_old_after_an_update(subject: Subject) -> None:
    """Every weight changes by a tenth: what kept the old ones would be off by far more than rounding."""
    engine: Any = subject.make()
    prompts = [conformance._ids(20, n) for n in range(8)]

    def gaps() -> tuple[torch.Tensor, torch.Tensor]:
        requests = [SampleRequest(prompt, 12, seed=n) for n, prompt in enumerate(prompts)]
        samples = conformance._sample_all(engine, requests)
        sequences = [
            TokenSequence((*p, *s.tokens), (*[False] * len(p), *[True] * len(s.tokens)))
            for p, s in zip(prompts, samples, strict=True)
        ]
        scored = torch.cat(engine.score(sequences))
        return (scored - torch.tensor([x for s in samples for x in s.logprobs])).abs(), scored

    before, _ = gaps()
    assert before.max() <= subject.tolerance
    old = conformance._view(engine)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in engine.trainer.model.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
    engine._stale = True
    assert conformance._gap(conformance._view(engine), old) > 0.5
    after, _ = gaps()
    assert after.max() <= subject.tolerance


@needs_vllm
@pytest.mark.slow
def test_adapters_are_sampled_with(subject: Subject) -> None:
    with_adapters: Any = functools.partial(subject.make, lora=LoraOptions(rank=4, alpha=8))
    conformance.sampling_follows_the_update(replace(subject, make=with_adapters))


PARENT = """
import sys, time
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.vllm.engine import VllmEngine, VllmOptions
engine = VllmEngine(TorchEngine(sys.argv[1], device="cpu"), VllmOptions(python=sys.argv[2]))
print(engine._worker._process.pid, engine._folder, flush=True)
time.sleep(600)
"""


@needs_vllm
@pytest.mark.slow
def test_nothing_is_left_of_a_parent_that_is_killed(folder: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(folder), str(PYTHON)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, weights = parent.stdout.readline().split()
        parent.kill()
    deadline = time.monotonic() + 20
    while Path("/proc", pid).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path("/proc", pid).exists()
    assert not Path(weights).exists()
