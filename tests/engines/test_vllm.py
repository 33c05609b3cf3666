"""vLLM as a sampler, with a script in place of its worker: errors, sessions, weights, and any learner."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import os
import queue
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from engines import tiny
from engines.tiny import (
    DATA,
    chosen,
    embedded,
    marked_all,
    sample_all,
    train,
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
from skillsd.engines.options import Capabilities, EngineOptions, EngineSpec
from skillsd.engines.replicas import Replicas
from skillsd.engines.torch.options import TorchOptions
from skillsd.engines.vllm import sampler as module
from skillsd.engines.vllm.client import WorkerClient
from skillsd.engines.vllm.options import VllmOptions
from skillsd.engines.vllm.sampler import VllmSampler
from skillsd.engines.vllm.worker import Worker
from skillsd.errors import EngineFailedError, UserError
from skillsd.metrics import Metrics
from skillsd.objective import CHOSEN, TokenLogprobs, Want

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
def echo(request: pytest.FixtureRequest, tied_folder: Path, echo_worker: None) -> Iterator[Engine]:
    """The embedded engine as learner; its weights are published."""
    learner = embedded(tied_folder).learner
    options = VllmOptions(timeout_seconds=20, max_model_len=getattr(request, "param", None))
    sampler = VllmSampler(learner, options, max_length=options.max_model_len, at_once=8)
    engine = Engine(learner, sampler, "vllm", options.provides())
    asyncio.run(engine.publish())
    yield engine
    engine.close()


def sample(engine: Engine, *tokens: int, **more: Any) -> Sample:
    return asyncio.run(engine.sampler.sample(SampleRequest(tokens, 4, seed=1, **more)))


def sampler_of(engine: Engine) -> VllmSampler:
    sampler = engine.sampler.samplers[0] if isinstance(engine.sampler, Replicas) else engine.sampler
    assert isinstance(sampler, VllmSampler)
    return sampler


def worker_of(engine: Engine) -> WorkerClient:
    worker = sampler_of(engine)._worker
    assert worker is not None
    return worker


def asked(engine: Engine) -> list[str]:
    """The kinds of the worker's requests so far."""
    return ["weights" if "weights" in line else "tokens" for line in worker_of(engine).log_tail(99).splitlines()]


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
    tiny.assert_is_written(echo, inbox)


def test_refused_update_publishes_nothing_new(echo: Engine) -> None:
    async def refused() -> StepReport:
        await echo.learner.forward_backward(DATA.batch(), lambda p, signals: (p.chosen.sum() * float("nan"), {}))
        return await echo.learner.step(1e-3)

    assert not asyncio.run(refused()).applied
    asyncio.run(echo.publish())
    sample(echo, 40)
    assert asked(echo) == ["tokens"]


def test_request_before_the_first_weights_is_an_error(tied_folder: Path) -> None:
    sampler = VllmSampler(embedded(tied_folder).learner, VllmOptions(), at_once=1)
    with pytest.raises(RuntimeError, match="publish"):
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


def test_only_a_sessions_new_tokens_are_sent(echo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    ask = WorkerClient.ask

    def spy(self: WorkerClient, message: Any) -> Any:
        sent.append((message.get("tokens"), message.get("keep")))
        return ask(self, message)

    monkeypatch.setattr(WorkerClient, "ask", spy)
    sample(echo, 40, 41, session="a")
    sample(echo, 40, 41, 7, 50, session="a")
    sample(echo, 40, 41, 7, 50)
    sample(echo, 40, 41, session="b")
    train(echo)  # publishes
    sample(echo, 40, 41, 7, 50, 7, session="a")
    echo.sampler.end_session("a")
    sample(echo, 60, session="a")
    assert sent == [
        ((40, 41), 0),
        ((50,), 3),
        ((40, 41, 7, 50), None),
        ((40, 41), 0),
        (None, None),  # the new weights
        ((40, 41, 7, 50, 7), 0),
        ((60,), 0),
    ]


def test_the_worker_keeps_the_sessions_tokens() -> None:
    prompts: list[list[int]] = []
    answers: list[dict[str, Any]] = []
    finished: list[Any] = []

    def add(name: str, prompt: dict[str, Any], parameters: Any) -> None:
        prompts.append(prompt["prompt_token_ids"])
        output = SimpleNamespace(finish_reason="stop", token_ids=[7], logprobs=[{7: SimpleNamespace(logprob=-0.5)}])
        finished[:] = [SimpleNamespace(finished=True, request_id=name, num_cached_tokens=0, outputs=[output])]

    engine = SimpleNamespace(add_request=add, step=lambda: finished, abort_request=lambda names: None)
    llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=lambda: True)
    worker = Worker(llm, SimpleNamespace(SamplingParams=lambda **options: options), queue.Queue(), answers.append)

    def take(number: int, *tokens: int, keep: int, step: bool = True) -> None:
        worker._take({"id": number, "session": "a", "keep": keep, "tokens": [*tokens], "parameters": {}})
        if step:
            worker._step()

    take(1, 1, 2, keep=0)
    take(2, 5, keep=3)
    assert prompts == [[1, 2], [1, 2, 7, 5]]
    take(3, 8, keep=5, step=False)
    worker._take({"abort": 3})
    take(4, 9, keep=5)  # the aborted request's tokens are not among the kept
    take(5, 6, keep=3)  # the client gave up on the answers to 2 and 4
    assert prompts[2:] == [[1, 2, 7, 5, 7, 8], [1, 2, 7, 5, 7, 9], [1, 2, 7, 6]]
    assert all("error" not in answer for answer in answers)
    worker._take({"end": "a"})
    take(6, 6, keep=3, step=False)
    assert "the session has 0 tokens, but 3 were to be kept" in answers[-1]["error"]
    take(7, 1, keep=0)
    worker._resume()  # new weights
    take(8, 1, keep=2, step=False)
    assert "the session has 0 tokens" in answers[-1]["error"]


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
    tied_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *args: False)  # no /dev/shm
    for python, words in (("/nowhere/python", r"engine\.python.*vllm-env"), (sys.executable, "has no vLLM")):
        engine = VllmOptions(python=python).build(EngineSpec(str(tied_folder), seed=0, device="cpu"))
        with pytest.raises(UserError, match=words):
            asyncio.run(engine.publish())
        engine.close()
        assert not list(tmp_path.glob("skillsd-weights-*"))


def test_any_other_finish_reason_is_an_error() -> None:
    """Otherwise the request would only end by its timeout."""
    answers: list[dict[str, Any]] = []
    ended = [
        SimpleNamespace(
            finished=reason is not None,
            request_id=str(number),
            num_cached_tokens=3,
            outputs=[
                SimpleNamespace(finish_reason=reason, token_ids=[7], logprobs=[{7: SimpleNamespace(logprob=-0.5)}])
            ],
        )
        for number, reason in enumerate(["stop", "error", None, "repetition"])
    ]
    llm = SimpleNamespace(llm_engine=SimpleNamespace(step=lambda: ended))
    Worker(llm, None, queue.Queue(), answers.append)._step()
    assert [answer["id"] for answer in answers] == [0, 1, 3]
    assert answers[0] == {"id": 0, "tokens": [7], "logprobs": [-0.5], "stop": "stop", "cached": 3}
    assert "'error'" in answers[1]["error"]
    assert "'repetition'" in answers[2]["error"]


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
    assert able == replace(learner, deterministic=False, exact_resume=False, publishes_folder=False, concurrent=True)
    other = with_learner("engines.test_vllm:FolderOptions").provides()
    assert other == Capabilities(lora=True, concurrent=True)


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
    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(OSError, match="no room"):
        with_learner("engines.test_vllm:FolderOptions").build(SPEC)
    assert len(closed) == 1
