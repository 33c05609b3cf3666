"""vLLM itself, where `make vllm-env` has installed it."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import tiny
from engines.tiny import DATA, chosen, conforms, sample_all, torch_engine, view
from skillsd.engines.base import Engine, Learner, SampleRequest, TokenSequence
from skillsd.engines.conformance import CHECKS, Check, Subject, run_check, sampling
from skillsd.engines.conformance.kit import gap
from skillsd.engines.options import EngineSpec, LoraOptions
from skillsd.engines.replicas import Replicas
from skillsd.engines.vllm import sampler as module
from skillsd.engines.vllm import transfer
from skillsd.engines.vllm.client import WORKER, WorkerClient
from skillsd.engines.vllm.options import VllmOptions
from skillsd.engines.vllm.sampler import VllmSampler

PYTHON = Path(__file__).parents[2] / "build" / "vllm" / "bin" / "python"
"""Where `make vllm-env` puts it."""

SampledEpisode = tuple[TokenSequence, tuple[float, ...]]
"""An episode's tokens, the sampled ones marked, and the sampler's log-probs of those."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM in {PYTHON.parents[1]}: make vllm-env"),
]


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
def subject(request: pytest.FixtureRequest, tied_folder: Path) -> Iterator[Subject]:
    worker, dtype = SharedWorker(), request.param
    options = VllmOptions(python=str(PYTHON))

    def make(*, snapshot_teacher: bool = False, micro_batch_tokens: int = 8192, **more: Any) -> Engine:
        teacher: Any = "snapshot" if snapshot_teacher else "student"
        spec = EngineSpec(str(tied_folder), 0, dtype, "cpu", teacher=teacher, micro_batch_tokens=micro_batch_tokens)
        return options.build(replace(spec, **more))

    exactness: dict[str, Any] = {"tolerance": 3e-5, "relative": 1e-4}
    if dtype == "bfloat16":
        exactness = {"tolerance": 0.3, "relative": 0.03, "batch_invariant": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # on shared cores, threads that wait for each other are slow
        patch.setattr(module, "WorkerClient", worker)
        yield Subject(make, tiny.Plain(tied_folder, dtype).logprobs, **exactness)
    if worker.client is not None:
        worker.client.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_engine_conforms(check: Check, subject: Subject) -> None:
    conforms(check, subject)


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


def test_adapters_are_sampled_with(subject: Subject) -> None:
    with_adapters: Any = functools.partial(subject.make, lora=LoraOptions(rank=4, alpha=8))
    run_check(sampling.sampling_follows_the_published_weights, replace(subject, make=with_adapters))


ON_A_CPU = """
import runpy, sys
from types import SimpleNamespace
import torch, vllm
from torch.multiprocessing import reductions

class LLM(vllm.LLM):
    def __init__(self, *, enable_sleep_mode=False, **options):  # which it refuses on a CPU
        super().__init__(**options)

def opened(kind, path, size, *rest):
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)

vllm.LLM = LLM
torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid="card")
torch.accelerator.synchronize = lambda *args: None
reductions.rebuild_cuda_tensor = opened
runpy.run_path(sys.argv[1], run_name="__main__")
"""


class OnAGpu:
    """A learner that pretends to be on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=4, alpha=8)], ids=["full", "lora"])
def test_weights_and_sleep_by_vllms_own_interface(
    lora: LoraOptions | None, tied_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's weight-transfer engine ``ipc`` and its calls around sleep, with a file in place of GPU memory."""
    script, buffer = tmp_path / "worker.py", tmp_path / "buffer"
    script.write_text(ON_A_CPU.replace("sys.argv[1]", repr(str(WORKER))))

    def allocate(size: int, device: torch.device) -> tuple[torch.Tensor, tuple[Any, ...]]:
        shared = torch.from_file(str(buffer), shared=True, size=size, dtype=torch.uint8)
        return shared, ("file", str(buffer), size, None, None, None, 0)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(transfer, "allocate", allocate)
    monkeypatch.setattr(transfer, "gpus", lambda: {"card": torch.device("cpu")})
    monkeypatch.setattr(transfer, "BUFFER", 20_000)
    monkeypatch.setattr(module, "WorkerClient", functools.partial(WorkerClient, worker=script))
    learner = tiny.embedded(tied_folder, lora=lora).learner
    options = VllmOptions(python=str(PYTHON))
    pretended: Any = OnAGpu(learner)
    sampler = VllmSampler(pretended, options, at_once=8)
    engine = Engine(learner, sampler, "vllm", options.provides())
    turns = [DATA.ids(300, 1), DATA.ids(300, 1) + DATA.ids(20, 2)]  # its blocks have 128 tokens on a CPU

    def largest_gap() -> float:
        for prompt in turns:
            [found] = sample_all(engine, [SampleRequest(prompt, 8, seed=1)])
            marked = TokenSequence((*prompt, *found.tokens), (*[False] * len(prompt), *[True] * len(found.tokens)))
        return gap(chosen(engine, [marked])[0], torch.tensor(found.logprobs))

    asyncio.run(engine.publish())
    assert sampler.inbox is None
    assert largest_gap() <= 3e-5
    assert sampler.metrics()["rollout/cached_prompt_tokens"] > 0.2
    for _ in range(2):
        old = view(engine)
        asyncio.run(sampler.sleep())
        tiny.train(engine, 5, learning_rate=0.1)
        assert gap(view(engine), old) > 0.5
        assert largest_gap() <= 3e-5
    engine.close()


@pytest.mark.timeout(900)  # three starts of vLLM
def test_a_killed_replica_is_replaced(tied_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = VllmOptions(python=str(PYTHON), replicas=2)
    engine = options.build(EngineSpec(str(tied_folder), seed=0, device="cpu", max_sessions=8))
    assert isinstance(engine.sampler, Replicas)

    async def episodes(*, kill: bool) -> list[SampledEpisode]:
        async def episode(number: int) -> SampledEpisode:
            tokens, logprobs, mask = tuple(DATA.ids(20 + number, number)), (), (False,) * (20 + number)
            for turn in range(4):
                found = await engine.sampler.sample(SampleRequest(tokens, 12, 10 * number + turn, session=str(number)))
                tokens, logprobs = (*tokens, *found.tokens, 40), (*logprobs, *found.logprobs)
                mask = (*mask, *[True] * len(found.tokens), False)
                if kill and (number, turn) == (0, 1):
                    victim = engine.sampler.samplers[0]
                    assert isinstance(victim, VllmSampler)
                    assert victim._worker is not None
                    victim._worker._process.kill()
            engine.sampler.end_session(str(number))
            return TokenSequence(tokens, mask), logprobs

        return await asyncio.gather(*(episode(number) for number in range(8)))

    def largest_gap(*, kill: bool = False) -> float:
        found = asyncio.run(episodes(kill=kill))
        ours = chosen(engine, [sequence for sequence, _ in found])
        return gap(torch.cat(ours), torch.tensor([x for _, logprobs in found for x in logprobs]))

    asyncio.run(engine.publish())
    assert largest_gap(kill=True) <= 3e-5
    tiny.train(engine, 3, learning_rate=0.1)
    assert len(engine.sampler.samplers) == 2
    metrics = engine.sampler.metrics()
    assert metrics["rollout/sampler_restarts"] == 1
    assert metrics["rollout/moved_requests"] >= 1
    assert largest_gap() <= 3e-5
    engine.close()


PARENT = """
import asyncio, sys, time
from skillsd.engines.options import EngineSpec
from skillsd.engines.vllm.options import VllmOptions
engine = VllmOptions(python=sys.argv[2]).build(EngineSpec(sys.argv[1], seed=0, device="cpu"))
asyncio.run(engine.publish())
sampler = engine.sampler.samplers[0]
print(sampler._worker._process.pid, sampler.inbox, engine.sampler.folder, flush=True)
time.sleep(600)
"""


def test_a_killed_parent_leaves_nothing_behind(tied_folder: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tied_folder), str(PYTHON)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, weights, shared = parent.stdout.readline().split()
        parent.kill()
    deadline = time.monotonic() + 20
    while Path("/proc", pid).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path("/proc", pid).exists()
    assert not Path(weights).exists()
    assert not Path(shared).exists()
