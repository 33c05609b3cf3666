"""vLLM on a GPU: weights in GPU memory, sleep and the prefix cache, against a stand-in for vLLM 0.32.0's API."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines import tiny
from engines.test_vllm import SPEC, FolderLearner
from engines.tiny import torch_engine
from skillsd.engines.base import Engine, SampleRequest, WeightsHandle
from skillsd.engines.options import LoraOptions
from skillsd.engines.vllm import transfer
from skillsd.engines.vllm.options import VllmOptions
from skillsd.engines.vllm.sampler import VllmSampler
from skillsd.errors import EngineFailedError, UserError

CARD = torch.device("cuda", 0)


class GpuLearner(FolderLearner):
    """Every weight is the version + 1. Its device is a pretence: the tensors are on the CPU."""

    device = CARD
    suffix = ""  # of the names in memory

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        shapes = {"embed": (5, 4), "norm": (7,), "layer": (3, 4), "head": (5, 4)}
        for name, shape in shapes.items():
            yield name + self.suffix, torch.full(shape, self.version + 1.0, dtype=torch.float32)

    async def publish(self, folder: Path | None = None) -> WeightsHandle:
        if folder is None:
            return WeightsHandle(self.version)
        (folder / "config.json").write_text(json.dumps({"dtype": "float32"}))
        save_file({name.removesuffix(self.suffix): w for name, w in self.weights()}, folder / "model.safetensors")
        return WeightsHandle(self.version, str(folder))


Make = Callable[..., Engine]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[Make]:
    """Makes an engine whose sampler runs the real worker with the stand-in for vLLM, and shares files as GPU memory."""
    package = tmp_path / "vllm"
    package.mkdir()
    shutil.copy(Path(__file__).with_name("fake_vllm.py"), package / "__init__.py")
    (package / "platforms.py").write_text(
        "import types\ncurrent_platform = types.SimpleNamespace(is_cpu=lambda: False)\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    buffers: list[Path] = []

    def allocate(size: int, device: torch.device) -> tuple[Tensor, tuple[Any, ...]]:
        buffers.append(tmp_path / f"buffer-{len(buffers)}")
        buffer = torch.from_file(str(buffers[-1]), shared=True, size=size, dtype=torch.uint8)
        return buffer, ("fake", str(buffers[-1]), size)

    monkeypatch.setattr(transfer, "allocate", allocate)
    monkeypatch.setattr(transfer, "gpus", lambda: {"card": torch.device("cpu")})
    monkeypatch.setattr(transfer, "BUFFER", 128)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    engines: list[Engine] = []

    def build(fault: str = "", learner: GpuLearner | None = None, **options: Any) -> Engine:
        monkeypatch.setenv("FAKE_VLLM", fault)
        settings = VllmOptions(python=str(python), timeout_seconds=60, **options)
        made = learner or GpuLearner()
        engines.append(Engine(made, VllmSampler(made, settings, at_once=8), "vllm", settings.provides()))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def calls(engine: Engine) -> list[str]:
    """Calls of vLLM's API since it was started."""
    assert isinstance(engine.sampler, VllmSampler)
    assert engine.sampler._worker is not None
    lines = re.findall("fake: (.*)", engine.sampler._worker.log_tail(99))
    return [line for line in lines if not line.startswith("options")]


def options(engine: Engine) -> dict[str, Any]:
    assert isinstance(engine.sampler, VllmSampler)
    found: dict[str, Any] = engine.sampler._llm_options(in_memory=True)
    return found


def update(engine: Engine) -> None:
    """A step of the learner, and its publication."""
    engine.learner.version += 1
    asyncio.run(engine.publish())


def logprob(engine: Engine, *tokens: int) -> float:
    request = SampleRequest(tokens or (40, 41), 4, seed=1)
    sample = asyncio.run(engine.sampler.sample(request))
    assert sample.version == engine.learner.version
    return sample.logprobs[0]


# -- weights --------------------------------------------------------------------------------------------------------

SENT = ["start", "chunk", "chunk", "finish"]
"""128 bytes of the buffer take embed and norm, then layer and head."""


def test_weights_reach_vllm_in_gpu_memory(make: Make) -> None:
    engine = make(sleep=False)
    sampler = engine.sampler
    assert isinstance(sampler, VllmSampler)
    folder = sampler.inbox
    assert folder is not None
    asyncio.run(engine.publish())  # in a folder: vLLM starts with it
    assert logprob(engine) == -1
    assert sampler.inbox is None
    assert not list(folder.glob("*.safetensors"))
    asyncio.run(engine.publish())  # of the same version
    assert calls(engine) == []
    for _ in range(2):
        update(engine)
    assert logprob(engine) == -3
    assert calls(engine) == [*SENT, "reset_prefix_cache"] * 2


def test_files_are_used_if_asked_for(make: Make) -> None:
    engine = make(weights="file", sleep=False)
    asyncio.run(engine.publish())
    update(engine)
    assert logprob(engine) == -2
    assert calls(engine) == ["reload_weights", "reset_prefix_cache"]


def test_files_are_used_if_names_differ(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """As with experts that transformers keeps in one tensor, and writes one by one."""

    class Renamed(GpuLearner):
        suffix = ".fused"

    engine = make(learner=Renamed())
    with caplog.at_level(logging.WARNING):
        asyncio.run(engine.publish())
    assert "other names or shapes" in caplog.text
    update(engine)
    assert logprob(engine) == -2
    with pytest.raises(UserError, match=r"other names or shapes.*engine\.weights=ipc"):
        asyncio.run(make(learner=Renamed(), weights="ipc").publish())


def test_chunks_are_of_one_dtype_and_size() -> None:
    sizes = [(3, torch.bfloat16), (2, torch.bfloat16), (4, torch.bfloat16), (1, torch.float32), (1, torch.bfloat16)]
    weights = [(str(n), torch.zeros(size, dtype=dtype)) for n, (size, dtype) in enumerate(sizes)]
    assert [[name for name, _ in part] for part in transfer.chunks(weights, 10)] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert list(transfer.chunks([], 10)) == []


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=4, alpha=8)], ids=["full", "lora"])
def test_learners_weights_are_those_it_publishes(lora: LoraOptions | None, tied_folder: Path, tmp_path: Path) -> None:
    engine = tiny.embedded(tied_folder, lora=lora)
    tiny.train(engine, 2)
    asyncio.run(engine.learner.publish(tmp_path))
    written = {name: w for path in tmp_path.glob("*.safetensors") for name, w in load_file(path).items()}
    held = dict(torch_engine(engine).weights())
    assert held.keys() == written.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in written.items())


# -- sleep ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ipc", "file"])
def test_vllm_sleeps_from_the_rollouts_to_the_new_weights(make: Make, weights: str) -> None:
    engine = make(weights=weights)
    asyncio.run(engine.sampler.sleep())  # not started yet
    asyncio.run(engine.publish())
    asyncio.run(engine.sampler.sleep())
    update(engine)
    assert logprob(engine) == -2
    load = SENT if weights == "ipc" else ["reload_weights"]
    woken = ["wake_up ['weights']", *load, "wake_up ['kv_cache']", "reset_prefix_cache"]
    assert calls(engine) == ["sleep 1", *woken]
    asyncio.run(engine.sampler.sleep())
    asyncio.run(engine.publish())  # the same version, after a refused update
    assert logprob(engine) == -2
    assert calls(engine) == ["sleep 1", *woken] * 2


def test_requests_wait_while_vllm_sleeps(make: Make) -> None:
    """Such as those of summaries in the background."""
    engine = make()

    async def run() -> tuple[int, int]:
        await engine.publish()
        early = asyncio.ensure_future(engine.sampler.sample(SampleRequest((40,), 4, seed=1)))
        await asyncio.sleep(0)
        await engine.sampler.sleep()
        late = asyncio.ensure_future(engine.sampler.sample(SampleRequest((41,), 4, seed=1)))
        await asyncio.sleep(0.2)
        assert early.done()
        assert not late.done()
        engine.learner.version += 1
        await engine.publish()
        return (await early).version, (await late).version

    assert asyncio.run(run()) == (0, 1)


# -- the prefix cache -----------------------------------------------------------------------------------------------


def test_turns_of_an_episode_share_their_prefix_until_the_next_weights(make: Make) -> None:
    engine = make()
    asyncio.run(engine.publish())
    turns = [(1, 2, 3, 4), (1, 2, 3, 4, 7, 5), (1, 2, 3, 4, 7, 5, 7, 6)]
    assert [logprob(engine, *turn) for turn in turns] == [-1, -1, -1]
    assert engine.sampler.metrics() == {"rollout/cached_prompt_tokens": pytest.approx((0 + 4 + 6) / 18)}
    assert engine.sampler.metrics() == {}
    update(engine)
    assert logprob(engine, *turns[2]) == -2  # -999, if keys and values of the old weights were left
    assert engine.sampler.metrics() == {"rollout/cached_prompt_tokens": 0}


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "settings", "words"),
    [
        ("chunk", {}, "IPC handle not found"),
        ("death", {}, "exit code 3"),
        ("memory", {}, r"out of memory.*Lower engine\.gpu_memory_utilization"),
        ("reload", {"weights": "file"}, "disk error"),
    ],
)
def test_mixed_weights_never_sample(make: Make, fault: str, settings: dict[str, Any], words: str) -> None:
    engine = make(fault, **settings)
    asyncio.run(engine.publish())
    asyncio.run(engine.sampler.sleep())
    with pytest.raises(EngineFailedError, match=rf"has not got version 1(.|\n)*may be old(.|\n)*{words}"):
        update(engine)
    with pytest.raises(EngineFailedError, match="has not got version 1"):
        logprob(engine)
    update(engine)  # starts another process
    assert logprob(engine) == -3
    assert calls(engine) == []


def test_error_of_the_learner_ends_vllm_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(sleep=False)
    asyncio.run(engine.publish())

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "allocate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update(engine)
    with pytest.raises(EngineFailedError, match="interrupted"):
        logprob(engine)


def test_the_worker_itself_refuses_requests_between_weights(make: Make) -> None:
    engine = make()
    asyncio.run(engine.publish())
    assert isinstance(engine.sampler, VllmSampler)
    asyncio.run(engine.sampler.sleep())
    engine.sampler._asleep = False
    with pytest.raises(EngineFailedError, match="weights are incomplete"):
        logprob(engine)


@pytest.mark.parametrize(
    "name", ["init_weight_transfer_engine", "start_weight_update", "finish_weight_update", "wake_up"]
)
def test_version_that_lacks_the_interface_is_refused(make: Make, name: str) -> None:
    with pytest.raises(UserError, match=rf"vLLM 0\.32\.0 .*has no LLM\.{name}: install vLLM .*engine\.weights=file"):
        asyncio.run(make(f"no {name}").publish())
    if name != "wake_up":
        asyncio.run(make(f"no {name}", weights="file", sleep=False).publish())


def test_gpu_of_vllm_that_the_learner_does_not_see_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "gpus", lambda: {"another": torch.device("cpu")})
    with pytest.raises(UserError, match=r"GPU 'card', which this process does not see.*engine\.weights=file"):
        asyncio.run(make().publish())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": "ipc"}, r"engine\.weights=ipc.*not on a GPU"),
        ({"sleep": True}, r"engine\.sleep=true.*not on a GPU"),
    ],
)
def test_options_that_need_a_gpu_are_refused_without_one(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=words):
        VllmSampler(FolderLearner(), VllmOptions(**settings), at_once=SPEC.max_sessions)


# -- which GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "visible", "expected", "share", "sleeps"),
    [
        (None, None, "0", 0.4, True),
        ([1], None, "1", 0.9, False),
        ([1], "5,3", "3", 0.9, False),
        ([0, 1], "GPU-a,GPU-b", "GPU-a,GPU-b", 0.4, True),
    ],
)
def test_gpus_of_vllm(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[int] | None,
    visible: str | None,
    expected: str,
    share: float,
    sleeps: bool,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    engine = make(gpus=gpus)
    asyncio.run(engine.learner.publish(engine.sampler.inbox))
    assert isinstance(engine.sampler, VllmSampler)
    assert engine.sampler._environment()["CUDA_VISIBLE_DEVICES"] == expected
    found = options(engine)
    assert found["gpu_memory_utilization"] == share
    assert found.get("enable_sleep_mode", False) is sleeps
    assert found.get("tensor_parallel_size", 1) == len(gpus or [0])


# -- on a GPU, without vLLM -----------------------------------------------------------------------------------------

READER = """
import base64, json, pickle, sys, torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
opened = {}
for line in sys.stdin:
    message = json.loads(line)
    if "chunk" in message:
        update = pickle.loads(base64.b64decode(message["chunk"]))
        handle = list(update["ipc_handles"][str(torch.cuda.get_device_properties(0).uuid)])
        handle[6] = 0
        if tuple(handle) not in opened:
            opened[tuple(handle)] = rebuild_cuda_tensor(*handle)
        packed = opened[tuple(handle)]
        pieces = packed[: sum(update["tensor_sizes"])].split(update["tensor_sizes"])
        kinds = zip(update["dtype_names"], pieces)
        print(json.dumps([float(piece.view(getattr(torch, dtype)).sum()) for dtype, piece in kinds]), flush=True)
    else:
        if "finish" in message:
            opened.clear()
            packed = pieces = kinds = None
        print("[]", flush=True)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_another_process_reads_the_weights_in_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, as in two updates; a weight in CPU memory is a merged one."""
    monkeypatch.setattr(transfer, "BUFFER", 4 << 20)
    card = next(iter(transfer.gpus().items()))
    sums: list[float] = []
    with subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None

        def call(message: Mapping[str, Any]) -> None:
            print(json.dumps(message), file=reader.stdin, flush=True)
            assert reader.stdout is not None
            sums.extend(json.loads(reader.stdout.readline()))

        before = torch.cuda.memory_allocated()
        for version in (1, 2):
            weights = {
                str(n): torch.full((1 << 20,), n * version, dtype=torch.bfloat16, device="cuda") for n in range(4)
            }
            weights["merged"] = torch.full((1 << 20,), 3.0 * version)
            sums.clear()
            transfer.send(weights.items(), dict([card]), call)
            assert sums == [float(n * version << 20) for n in (0, 1, 2, 3, 3)]
            del weights
            assert torch.cuda.memory_allocated() == before  # the buffer is gone, too
        reader.stdin.close()
