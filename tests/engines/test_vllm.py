"""Rollouts by vLLM, with any learner: first without vLLM, then (slow) with it, where `make vllm-env` has put it."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

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
from skillsd.engines import registry
from skillsd.engines.base import (
    Engine,
    Learner,
    Loss,
    Sample,
    SampleRequest,
    StepReport,
    TokenSequence,
    TrainItem,
    Weights,
    WeightsHandle,
)
from skillsd.engines.conformance import CHECKS, Check, Subject, run_check, sampling
from skillsd.engines.conformance.kit import gap
from skillsd.engines.options import Capabilities, EngineOptions, EngineSpec, LoraOptions
from skillsd.engines.torch.export import write_merged
from skillsd.engines.torch.options import TorchOptions
from skillsd.engines.vllm import sampler as module
from skillsd.engines.vllm.client import WorkerClient
from skillsd.engines.vllm.options import VllmOptions
from skillsd.engines.vllm.sampler import VllmSampler
from skillsd.engines.vllm.worker import Worker
from skillsd.errors import EngineFailedError, UserError
from skillsd.metrics import Metrics
from skillsd.objective import CHOSEN, TokenLogprobs, Want

PYTHON = Path(__file__).parents[2] / "build" / "vllm" / "bin" / "python"
"""Where `make vllm-env` puts it."""

needs_vllm = pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM in {PYTHON.parents[1]}: make vllm-env")

SIZES = {**tiny.GROUPED, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""vLLM's CPU kernels take heads of 32 and some multiples."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied embeddings: vLLM's CPU build does not update a tied head."""
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
def echo_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of vLLM, a script that always samples token 7. The last token of a request can make it fail."""
    script = tmp_path / "worker.py"
    script.write_text(ECHO)
    monkeypatch.setattr(module, "WorkerClient", functools.partial(WorkerClient, worker=script))


@pytest.fixture
def echo(request: pytest.FixtureRequest, folder: Path, echo_worker: None) -> Iterator[Engine]:
    """The embedded engine as learner; its weights are published."""
    learner = embedded(folder).learner
    options = VllmOptions(timeout_seconds=20, max_model_len=getattr(request, "param", None))
    sampler = VllmSampler(learner, options, max_length=options.max_model_len, at_once=8)
    engine = Engine(learner, sampler, "vllm", options.provides())
    asyncio.run(engine.publish())
    yield engine
    engine.close()


def sample(engine: Engine, *tokens: int, **more: Any) -> Sample:
    return asyncio.run(engine.sampler.sample(SampleRequest(tokens, 4, seed=1, **more)))


def sampler_of(engine: Engine) -> VllmSampler:
    assert isinstance(engine.sampler, VllmSampler)
    return engine.sampler


def worker_of(engine: Engine) -> WorkerClient:
    worker = sampler_of(engine)._worker
    assert worker is not None
    return worker


def asked(engine: Engine) -> list[str]:
    """The kinds of the worker's requests so far."""
    return ["weights" if "weights" in line else "tokens" for line in worker_of(engine).log_tail(99).splitlines()]


def assert_is_written(engine: Engine, folder: Path) -> None:
    """`folder` holds the student, as a model whose head is not tied to its embeddings."""
    plain = tiny.Plain(folder)
    model: Any = plain.model
    assert not model.config.tie_word_embeddings
    model.lm_head.weight.data.copy_(load_file(folder / "head.safetensors")["lm_head.weight"])
    sequence = marked_all(DATA.ids(20, 0))
    assert gap(distribution(engine, sequence), plain.logprobs(sequence.tokens)[:-1]) < 5e-5


def test_published_weights_are_loaded_once(echo: Engine, tmp_path: Path) -> None:
    assert sample(echo, 40, 41) == Sample((7,), (-0.5,), "length", version=0)
    assert asked(echo) == ["tokens"]  # the first weights were loaded at the start
    asyncio.run(echo.publish())  # of a version that is loaded already
    train(echo, 1)  # publishes
    asyncio.run(echo.publish())
    assert sample(echo, 40).version == echo.learner.version == 1
    assert asked(echo) == ["tokens", "weights", "tokens"]
    asyncio.run(echo.learner.save_state(tmp_path))
    train(echo, 2)
    asyncio.run(echo.load_state(tmp_path))
    assert sample(echo, 40).version == 1
    assert asked(echo)[3:] == ["weights", "weights", "tokens"]
    inbox = echo.sampler.inbox
    assert inbox is not None
    assert_is_written(echo, inbox)


def test_refused_update_publishes_nothing_new(echo: Engine) -> None:
    async def refused() -> StepReport:
        await echo.learner.forward_backward(DATA.batch(), lambda p, signals: (p.chosen.sum() * float("nan"), {}))
        return await echo.learner.step(1e-3)

    assert not asyncio.run(refused()).applied
    asyncio.run(echo.publish())
    sample(echo, 40)
    assert asked(echo) == ["tokens"]


def test_request_before_the_first_weights_is_an_error(folder: Path) -> None:
    sampler = VllmSampler(embedded(folder).learner, VllmOptions(), at_once=1)
    with pytest.raises(RuntimeError, match="published"):
        asyncio.run(sampler.sample(SampleRequest((40,), 4, seed=1)))
    sampler.close()
    assert sampler.inbox is not None
    assert not sampler.inbox.exists()


def test_weights_must_be_in_the_inbox(echo: Engine) -> None:
    for handle in (WeightsHandle(5), WeightsHandle(5, "/somewhere/else")):
        with pytest.raises(ValueError, match=str(echo.sampler.inbox)):
            asyncio.run(echo.sampler.load(handle))


def test_teacher_is_sampled_by_the_learner(echo: Engine) -> None:
    assert echo.sampler_of("student") is echo.sampler
    assert echo.sampler_of("teacher") is echo.learner
    request = SampleRequest((40, 41), 4, seed=1, weights="teacher")
    with pytest.raises(ValueError, match="teacher"):
        asyncio.run(echo.sampler.sample(request))
    [found] = sample_all(echo, [request])
    assert found.tokens != (7,)
    assert asked(echo) == []


def test_request_that_does_not_extend_its_session_is_refused(echo: Engine) -> None:
    sample(echo, 40, 41, session="a")
    with pytest.raises(ValueError, match="extend"):
        sample(echo, 40, 41, 8, session="a")
    sample(echo, 40, 41, 7, 50, session="a")
    echo.sampler.end_session("a")
    sample(echo, 50, session="a")


@pytest.mark.parametrize("echo", [16], indirect=True)
def test_the_samplers_length_does_not_limit_scoring(echo: Engine) -> None:
    assert echo.sampler.max_length == 16
    assert echo.max_length == echo.learner.max_length > 16
    assert sampler_of(echo)._llm_options()["max_model_len"] == 16
    assert sample(echo, *[40] * 12).tokens == (7,)  # and 4 more are requested
    with pytest.raises(ValueError, match=r"17 tokens.*at most 16 \(engine\.max_model_len\)"):
        sample(echo, *[40] * 13)
    assert len(chosen(echo, [marked_all([40] * 30)])[0]) == 29


def test_an_error_of_the_worker_fails_that_request(echo: Engine) -> None:
    with pytest.raises(EngineFailedError, match="refused a request: too long"):
        sample(echo, 97)
    assert sample(echo, 40).tokens == (7,)
    with pytest.raises(EngineFailedError, match=r"exit code 1.*\n.*(\n.*)*something broke"):
        sample(echo, 99)
    with pytest.raises(EngineFailedError, match="something broke"):  # later requests get the same error
        sample(echo, 40)


def test_killed_worker_fails_all_pending_requests(echo: Engine) -> None:
    async def run() -> list[Any]:
        requests = [SampleRequest((40 + n, 98), 4, seed=n) for n in range(3)]
        waiting = [asyncio.ensure_future(echo.sampler.sample(request)) for request in requests]
        await asyncio.sleep(0.5)
        os.kill(worker_of(echo)._process.pid, signal.SIGKILL)
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert all("killed by signal 9" in str(error) for error in asyncio.run(run()))


def test_timeout_is_an_error(echo: Engine) -> None:
    sampler_of(echo).options = VllmOptions(timeout_seconds=0.3)
    with pytest.raises(EngineFailedError, match=r"0\.3 s"):
        sample(echo, 98)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="this interpreter has vLLM")
def test_interpreter_that_is_missing_or_has_no_vllm(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *args: False)  # no /dev/shm
    for python, words in (("/nowhere/python", r"engine\.python.*vllm-env"), (sys.executable, "has no vLLM")):
        engine = VllmOptions(python=python).build(EngineSpec(str(folder), seed=0, device="cpu"))
        with pytest.raises(UserError, match=words):
            asyncio.run(engine.publish())
        engine.close()
        assert not list(tmp_path.glob("skillsd-vllm-*"))


def test_any_other_finish_reason_is_an_error() -> None:
    """Otherwise the request would only end by its timeout."""
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


def test_full_disk_is_named(folder: Path, tmp_path: Path) -> None:
    engine = embedded(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=rf"can't write the weights.*GiB\) into '{tmp_path}'.*TMPDIR"):
            asyncio.run(engine.learner.publish(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_merged_weights_keep_their_dtype(folder: Path, tmp_path: Path) -> None:
    """Although adapters, and sums with them, are float32."""
    engine = embedded(folder, dtype="bfloat16", lora=LoraOptions(rank=4, alpha=8))
    train(engine, 2)
    asyncio.run(engine.learner.publish(tmp_path))
    for file in ("model.safetensors", "head.safetensors"):
        assert {weight.dtype for weight in load_file(tmp_path / file).values()} == {torch.bfloat16}
    written = sum((tmp_path / file).stat().st_size for file in ("model.safetensors", "head.safetensors"))
    assert written < engine.learner.published_bytes


def test_adapters_of_experts_are_merged(tmp_path: Path) -> None:
    kind, sizes = tiny.ARCHITECTURES["qwen3-moe"]
    model = tiny.write(tmp_path / "moe", kind, {**sizes, "tie_word_embeddings": False})
    engine = embedded(model, lora=LoraOptions(rank=2, alpha=8))
    train(engine, 3)
    write_merged(torch_engine(engine).model, tmp_path / "out", untie=True)
    sequence = marked_all(DATA.ids(20, 0))
    trained = distribution(engine, sequence)
    assert gap(trained, tiny.Plain(model).logprobs(sequence.tokens)[:-1]) > 1e-3
    assert gap(trained, tiny.Plain(tmp_path / "out").logprobs(sequence.tokens)[:-1]) < 1e-4


HEAD = LoraOptions(rank=4, alpha=8, target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize(
    "options", [{}, {"lora": LoraOptions(rank=4, alpha=8)}, {"lora": HEAD}], ids=["full", "lora", "lora of the head"]
)
def test_published_weights_are_the_model_with_an_untied_head(
    options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    engine = embedded(folder, **options)
    train(engine, 3)
    before = view(engine)
    handle = asyncio.run(engine.learner.publish(tmp_path))
    assert handle == WeightsHandle(3, str(tmp_path))
    assert torch.equal(view(engine), before)
    assert_is_written(engine, tmp_path)


# -- with another learner -------------------------------------------------------------------------------------------


class FolderLearner(Learner):
    """Not a `TorchEngine`: all that vLLM needs of a learner is a folder of weights, stop tokens and a length."""

    tokenizer = None
    stop_tokens = frozenset({7})
    max_length = 64

    def __init__(self) -> None:
        self.version = 0
        self.published: list[int] = []

    async def logprobs(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
        want: Want = CHOSEN,
    ) -> list[TokenLogprobs]:
        return [TokenLogprobs(torch.zeros(sequence.marked)) for sequence in sequences]

    async def forward_backward(self, batch: Sequence[TrainItem], loss: Loss, *, temperature: float = 1.0) -> Metrics:
        return {}

    async def step(self, learning_rate: float) -> StepReport:
        self.version += 1
        return StepReport(True, None, self.version)

    async def sync_teacher(self, rate: float = 1.0) -> None: ...

    async def publish(self, folder: Path | None = None) -> WeightsHandle:
        assert folder is not None
        (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
        self.published.append(self.version)
        return WeightsHandle(self.version, str(folder))

    async def save_state(self, folder: Path) -> None: ...

    async def load_state(self, folder: Path) -> None:
        self.version = 5


class FolderOptions(EngineOptions):
    """A recipe names it ``engines.test_vllm:FolderOptions``."""

    capabilities: ClassVar[Capabilities] = Capabilities(publishes_folder=True, lora=True)

    pace: int = 1

    def build(self, spec: EngineSpec) -> Engine:
        no_sampler: Any = SimpleNamespace(close=lambda: None)
        return Engine(FolderLearner(), no_sampler, self.name, self.provides())


def with_learner(name: str, **options: Any) -> EngineOptions:
    return registry.options({"name": "vllm", "timeout_seconds": 20, "learner": {"name": name, **options}})


SPEC = EngineSpec("no model", seed=0, max_sessions=8)


def test_any_learner_that_publishes_a_folder_will_do(echo_worker: None, tmp_path: Path) -> None:
    options = with_learner("engines.test_vllm:FolderOptions", pace=3)
    options.check(SPEC)
    engine = options.build(SPEC)
    learner = engine.learner
    assert isinstance(learner, FolderLearner)
    assert engine.name == "vllm"
    assert engine.sampler.max_length == 64

    async def run() -> list[int]:
        await engine.publish()
        versions = [(await engine.sampler.sample(SampleRequest((40,), 4, seed=0))).version]
        await learner.step(1e-3)
        await engine.publish()
        versions.append((await engine.sampler.sample(SampleRequest((40,), 4, seed=0))).version)
        await engine.load_state(tmp_path)
        versions.append((await engine.sampler.sample(SampleRequest((40,), 4, seed=0))).version)
        return versions

    assert asyncio.run(run()) == [0, 1, 5]
    assert learner.published == [0, 1, 5]
    sampler = sampler_of(engine)
    assert sampler._llm_options()["dtype"] == "bfloat16"
    assert sampler._parameters(SampleRequest((40,), 4, seed=0))["stop_token_ids"] == [7]
    assert asked(engine) == ["tokens", "weights", "tokens", "weights", "tokens"]
    with pytest.raises(UserError, match="can't sample from the teacher"):
        engine.sampler_of("teacher")
    engine.close()


class NoFolderOptions(FolderOptions):
    """A learner whose weights can't leave it."""

    capabilities: ClassVar[Capabilities] = Capabilities()


def test_learner_that_can_not_publish_a_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.learner is 'engines\.test_vllm:NoFolderOptions'.*folder"):
        with_learner("engines.test_vllm:NoFolderOptions").check(SPEC)


def test_capabilities_are_the_learners_without_determinism() -> None:
    able = VllmOptions().provides()
    learner = TorchOptions.capabilities
    assert able == replace(learner, deterministic=False, exact_resume=False, publishes_folder=False)
    other = with_learner("engines.test_vllm:FolderOptions").provides()
    assert other == Capabilities(lora=True)


def test_what_the_learner_can_not_do_is_refused() -> None:
    options = with_learner("engines.test_vllm:FolderOptions")
    options.check(replace(SPEC, needs={"lora": "model.lora"}))
    with pytest.raises(UserError, match=r"teacher\.ema=0\.9 needs a teacher that is a moving average.*'vllm'"):
        options.check(replace(SPEC, needs={"teacher_average": "teacher.ema=0.9"}))


def test_learner_is_closed_if_the_sampler_can_not_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Learner] = []

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(FolderLearner, "close", lambda self: closed.append(self))
    monkeypatch.setattr(module.tempfile, "mkdtemp", fail)
    with pytest.raises(OSError, match="no room"):
        with_learner("engines.test_vllm:FolderOptions").build(SPEC)
    assert len(closed) == 1


# -- vLLM itself ----------------------------------------------------------------------------------------------------


class SharedWorker:
    """One vLLM process for many engines, one after the other: starting it takes half a minute."""

    def __init__(self) -> None:
        self.client: WorkerClient | None = None

    def __call__(self, python: str, options: dict[str, Any], environment: dict[str, str]) -> SharedWorker:
        if self.client is None:
            self.client = WorkerClient(python, options, environment)
        else:  # as if it had been started with these weights
            _, answer = self.client.ask({"weights": options["model"]})
            answer.result(120)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def close(self) -> None:
        """The engines don't end it."""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def subject(request: pytest.FixtureRequest, folder: Path) -> Iterator[Subject]:
    worker, dtype = SharedWorker(), request.param
    options = VllmOptions(python=str(PYTHON))

    def make(*, snapshot_teacher: bool = False, micro_batch_tokens: int = 8192, **more: Any) -> Engine:
        teacher: Any = "snapshot" if snapshot_teacher else "student"
        spec = EngineSpec(str(folder), 0, dtype, "cpu", teacher=teacher, micro_batch_tokens=micro_batch_tokens)
        return options.build(replace(spec, **more))

    exactness: dict[str, Any] = {"tolerance": 3e-5, "relative": 1e-4}
    if dtype == "bfloat16":
        exactness = {"tolerance": 0.3, "relative": 0.03, "batch_invariant": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # on shared cores, threads that wait for each other are slow
        patch.setattr(module, "WorkerClient", worker)
        yield Subject(make, tiny.Plain(folder, dtype).logprobs, **exactness)
    if worker.client is not None:
        worker.client.close()


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_engine_conforms(check: Check, subject: Subject) -> None:
    conforms(check, subject)


@needs_vllm
@pytest.mark.slow
def test_no_layer_stays_old_after_an_update(subject: Subject) -> None:
    """Every weight changes by a tenth: a layer with old weights would be off by far more than rounding."""
    engine = subject.make()
    asyncio.run(engine.publish())
    prompts = [DATA.ids(20, n) for n in range(8)]

    def largest_gap() -> float:
        requests = [SampleRequest(prompt, 12, seed=n) for n, prompt in enumerate(prompts)]
        samples = sample_all(engine, requests)
        sequences = [
            TokenSequence((*p, *s.tokens), (*[False] * len(p), *[True] * len(s.tokens)))
            for p, s in zip(prompts, samples, strict=True)
        ]
        return gap(torch.cat(chosen(engine, sequences)), torch.tensor([x for s in samples for x in s.logprobs]))

    assert largest_gap() <= subject.tolerance
    old = view(engine)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in torch_engine(engine).model.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
    engine.learner.version += 1
    asyncio.run(engine.publish())
    assert gap(view(engine), old) > 0.5
    assert largest_gap() <= subject.tolerance
    engine.close()


@needs_vllm
@pytest.mark.slow
def test_adapters_are_sampled_with(subject: Subject) -> None:
    with_adapters: Any = functools.partial(subject.make, lora=LoraOptions(rank=4, alpha=8))
    run_check(sampling.sampling_follows_the_published_weights, replace(subject, make=with_adapters))


PARENT = """
import asyncio, sys, time
from skillsd.engines.options import EngineSpec
from skillsd.engines.vllm.options import VllmOptions
engine = VllmOptions(python=sys.argv[2]).build(EngineSpec(sys.argv[1], seed=0, device="cpu"))
asyncio.run(engine.publish())
print(engine.sampler._worker._process.pid, engine.sampler.inbox, flush=True)
time.sleep(600)
"""


@needs_vllm
@pytest.mark.slow
def test_a_killed_parent_leaves_nothing_behind(folder: Path) -> None:
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
