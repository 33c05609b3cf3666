"""What goes wrong between the Tinker engine and its server, and what a recipe can't ask of it: one message each."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

tinker = pytest.importorskip("tinker", reason="the SDK is not installed: pip install tinker")

from toy_env import Toy
from toy_run import Listener, toy_settings

from engines import tiny
from engines.fake_tinker import LOST, FakeServer, Fault, http_error
from skillsd.config import RunConfig
from skillsd.engines.base import Engine, SampleRequest
from skillsd.engines.conformance.kit import WEIGHTED
from skillsd.engines.options import EngineSpec, LoraOptions
from skillsd.engines.tinker import adapters, service
from skillsd.engines.tinker.engine import TinkerEngine
from skillsd.engines.tinker.options import TinkerOptions
from skillsd.errors import EngineFailedError, UserError
from skillsd.files.read import DamagedError
from skillsd.runs.build import build
from skillsd.runs.checks import check_config, engine_spec
from skillsd.training.loop import train

Folder = Callable[[str], Path]
KEY = "tml-secret-of-the-test"
SPEC = EngineSpec("a-model", seed=1, lora=LoraOptions(), teacher="student")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.setattr(service, "BACKOFF_SECONDS", 0.0)


@pytest.fixture
def server(model_folder: Folder) -> FakeServer:
    return FakeServer(model_folder("llama"))


def engine_of(server: FakeServer, **options: Any) -> TinkerEngine:
    spec = replace(SPEC, model=str(server.folder), lora=LoraOptions(rank=4))
    return TinkerEngine(TinkerOptions(**options), spec, server.connect)


async def sampled(engine: TinkerEngine) -> tuple[int, ...]:
    await engine.load(await engine.publish())
    return (await engine.sample(SampleRequest(tiny.DATA.ids(6, 0), 4, seed=1))).tokens


async def stepped(engine: TinkerEngine) -> bool:
    await engine.forward_backward(tiny.DATA.batch(), WEIGHTED)
    return (await engine.step(1e-3)).applied


async def scored(engine: TinkerEngine) -> Any:
    return await engine.logprobs(tiny.DATA.sequences())


# -- requests that fail ---------------------------------------------------------------------------------------------

RETRIED = [http_error(500, "out of luck"), http_error(410, "the future is gone"), http_error(429, "slower")]


@pytest.mark.parametrize(("call", "work"), [("sample", sampled), ("forward", scored)])
def test_a_lost_sample_or_score_is_requested_again(
    server: FakeServer, call: str, work: Callable[[TinkerEngine], Coroutine[Any, Any, Any]]
) -> None:
    """The same request gives the same answer; after `max_retries` the run ends with the server's words."""
    expected = asyncio.run(work(engine_of(server)))
    server.faults[call] = [*RETRIED]
    found = asyncio.run(work(engine_of(server)))
    assert str(found) == str(expected)
    server.faults[call] = [*RETRIED, http_error(503, "still nothing")]
    with pytest.raises(EngineFailedError, match=r"failed at the request for .*still nothing.*resumed from its last"):
        asyncio.run(work(engine_of(server)))


@pytest.mark.parametrize("call", ["forward_backward", "optim_step"])
def test_a_training_request_is_never_done_twice(server: FakeServer, call: str) -> None:
    server.faults[call] = [http_error(500, "out of luck")]
    with pytest.raises(EngineFailedError, match=r"(a gradient|an optimiser step): .*out of luck.*resumed"):
        asyncio.run(stepped(engine_of(server)))
    assert server.calls.count(call) == 1


@pytest.mark.parametrize(
    ("call", "work", "words"),
    [
        ("get_server_capabilities", None, "the list of its models"),
        ("create", scored, "a new adapter"),
        ("sampler", sampled, "a sampler of"),
        ("sample", sampled, "a sample"),
        ("forward", scored, "log-probs"),
        ("forward_backward", stepped, "a gradient"),
        ("optim_step", stepped, "an optimiser step"),
    ],
)
def test_every_wait_has_a_deadline_and_names_what_did_not_answer(
    server: FakeServer, call: str, work: Callable[[TinkerEngine], Coroutine[Any, Any, Any]] | None, words: str
) -> None:
    async def wait() -> None:
        engine = engine_of(server, timeout_seconds=2)
        assert work is not None
        await work(engine)

    server.faults[call] = [LOST]
    with pytest.raises(EngineFailedError, match=rf"the Tinker service gave no answer to the request for {words}.*2 s"):
        asyncio.run(wait())


def test_a_call_that_hangs_does_not_keep_the_process_alive() -> None:
    program = """
import asyncio, os, time
os.environ["TINKER_API_KEY"] = "tml-x"
from skillsd.engines.tinker.options import TinkerOptions
from skillsd.engines.tinker.service import Service
service = Service(TinkerOptions(timeout_seconds=1), lambda address, key: (object(), object()))
try:
    asyncio.run(service.call("nothing", lambda: time.sleep(600)))
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "gave no answer to the request for nothing within 1 s" in done.stdout


def test_a_full_server_is_explained(server: FakeServer) -> None:
    server.most = 1
    asyncio.run(scored(engine_of(server)))
    with pytest.raises(UserError, match=r"Maximum number of LoRA adapters \(1\).*raise its max_lora_adapters"):
        asyncio.run(scored(engine_of(server)))


def test_an_expired_state_is_explained(server: FakeServer, tmp_path: Path) -> None:
    async def expire() -> None:
        engine = engine_of(server)
        await engine.save_state(tmp_path)
        server.saved.clear()
        await engine_of(server).load_state(tmp_path)

    with pytest.raises(UserError, match=r"the state tinker://fake/weights/v0-\w+: .*has expired or been deleted there"):
        asyncio.run(expire())


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (http_error(401, f"bad key {KEY}"), UserError, r"refuses the key of \$TINKER_API_KEY.*bad key \*\*\*"),
        (http_error(422, "unknown field"), UserError, "SkyRL 0.4.0's server .* needs the package tinker 0.25"),
        (ModuleNotFoundError("no protobuf"), EngineFailedError, "ModuleNotFoundError: no protobuf"),
        (tinker.RequestFailedError("oom", "7", "server"), EngineFailedError, "RequestFailedError: oom"),
    ],
)
def test_errors_of_the_sdk_are_one_line_without_the_key(
    server: FakeServer, error: Exception, kind: type[Exception], words: str
) -> None:
    server.faults["create"] = [error]
    with pytest.raises(kind, match=words) as raised:
        asyncio.run(scored(engine_of(server)))
    assert KEY not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.__suppress_context__  # the SDK's own exception has the key in its request's headers


# -- answers that are wrong -----------------------------------------------------------------------------------------


def nan_logprobs(answer: Any) -> Any:
    for output in answer.loss_fn_outputs:
        output["logprobs"] = tinker.types.TensorData.from_torch(output["logprobs"].to_torch() * torch.nan)
    return answer


def nan_norm(answer: Any) -> Any:
    return SimpleNamespace(metrics={"x/grad_norm": float("nan")})


def without_stop(answer: Any) -> Any:
    return SimpleNamespace(sequences=[SimpleNamespace(tokens=[40, 41], logprobs=[-1.0, -1.0], stop_reason="stop")])


def nan_sample(answer: Any) -> Any:
    return SimpleNamespace(sequences=[SimpleNamespace(tokens=[40], logprobs=[float("nan")], stop_reason="length")])


@pytest.mark.parametrize(
    ("call", "fault", "work", "words"),
    [
        ("forward", nan_logprobs, scored, "log-probs are not finite"),
        ("optim_step", nan_norm, stepped, r"gradient at the Tinker service was not finite \(norm nan\)"),
        ("sample", without_stop, sampled, "without its stop token"),
        ("sample", nan_sample, sampled, "sampled log-probs are not finite"),
    ],
)
def test_answers_that_can_not_be_trained_on_stop_the_run(
    server: FakeServer, call: str, fault: Fault, work: Callable[[TinkerEngine], Coroutine[Any, Any, Any]], words: str
) -> None:
    server.faults[call] = [fault]
    with pytest.raises(EngineFailedError, match=words):
        asyncio.run(work(engine_of(server)))


def test_weights_of_another_version_are_not_loaded(server: FakeServer) -> None:
    async def load() -> None:
        engine = engine_of(server)
        with pytest.raises(EngineFailedError, match="no weights yet"):
            await engine.sample(SampleRequest((40,), 1, seed=0))
        handle = await engine.publish()
        with pytest.raises(ValueError, match="published last"):
            await engine.load(replace(handle, version=7))
        with pytest.raises(UserError, match="can't publish its weights into a folder"):
            await engine.publish(server.folder)

    asyncio.run(load())


# -- the start ------------------------------------------------------------------------------------------------------


def test_a_missing_key_is_named_by_its_variable(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY")
    with pytest.raises(UserError, match=r"'TINKER_API_KEY' holds no key for the Tinker service.*engine\.api_key_env"):
        engine_of(server)
    monkeypatch.setenv("MINE", "tml-a b")
    with pytest.raises(UserError, match="'MINE' does not hold a key") as raised:
        engine_of(server, api_key_env="MINE")
    assert "a b" not in str(raised.value)
    options = TinkerOptions(server="skyrl", base_url="http://localhost:8000")
    TinkerEngine(options, replace(SPEC, model=str(server.folder)), server.connect)
    assert server.connections == [("http://localhost:8000", service.NO_KEY)]
    with pytest.raises(ValueError, match="not the key itself"):
        TinkerOptions(api_key_env="tml-1234-5678")


@pytest.mark.parametrize(
    ("installed", "server", "words"),
    [
        (None, "tinker", r"pip install 'tinker'.*installed is None"),
        (
            "0.38.0",
            "skyrl",
            r"pip install 'tinker==0\.25\.\*'.*the hosted service .* the newest; installed is 0\.38\.0",
        ),
        ("0.38.0", "skyrl-jax", r"pip install 'tinker==0\.25\.\*'"),
    ],
)
def test_the_sdk_has_to_be_the_servers(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, server: Any, words: str
) -> None:
    monkeypatch.setattr(service, "installed", lambda: installed)
    with pytest.raises(UserError, match=words):
        TinkerOptions(server=server).build(SPEC)


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    """The SDK alone would try for five minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=rf"nothing answers at {address} \(engine\.base_url\): .*Start the server"):
        service.Service(TinkerOptions(server="skyrl", base_url=address))


def test_an_unknown_base_model_is_refused_with_those_that_there_are(server: FakeServer) -> None:
    with pytest.raises(UserError, match=rf"no model 'other' \(engine\.base_model.*it has: {server.folder}"):
        engine_of(server, base_model="other")
    assert server.closed
    assert engine_of(server).max_length == 400  # the server's limit; the model's own is 512


def test_a_model_without_a_tokenizer_here_is_refused(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"can't read the tokenizer and configuration of .*model\.name"):
        TinkerEngine(TinkerOptions(), replace(SPEC, model=str(tmp_path)), server.connect)


REFUSED = {
    "rollout.temperature=0.7": {"rollout": {"temperature": 0.7}},
    "teacher.ema=0.9 needs": {"teacher": {"ema": 0.9}},
    "objective.estimator=reverse_kl": {"objective": {"estimator": "reverse_kl"}},
    "method=teacher-rollouts": {"method": "teacher-rollouts"},
    "method=opd-external": {"method": "opd-external", "teacher": {"model": "other"}},
    r"set model\.lora=\{\}": {"model": {"lora": None}},
    r"model\.lora\.alpha is 16, but .* fix it at 32": {"model": {"lora": {"alpha": 16}}},
    r"model\.lora\.target_modules is \['q_proj'\]": {"model": {"lora": {"target_modules": ["q_proj"]}}},
    r"model\.adapter is 'x'": {"model": {"lora": None, "adapter": "x"}},
    r"training\.max_grad_norm is 1, but .*max_grad_norm=\.inf": {"engine": {"server": "skyrl"}},
    "method=skill-sd-frozen needs a teacher with weights": {
        "engine": {"server": "skyrl-jax"},
        "method": "skill-sd-frozen",
    },
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_the_engine_can_not_do_is_refused_by_name(words: str, tiny_model: Path) -> None:
    sections: dict[str, Any] = {"model": {"lora": {}}, "engine": {"name": "tinker"}}
    for name, value in REFUSED[words].items():
        sections[name] = {**sections.get(name, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=words):
        check_config(RunConfig.model_validate(toy_settings(tiny_model, **sections)))


@pytest.mark.parametrize("method", ["skill-sd", "grpo", "opd", "skill-sd-frozen", "grpo-imitation", "skill-grpo"])
def test_what_it_can_do_is_not(method: str, tiny_model: Path) -> None:
    sections: dict[str, Any] = {"model": {"lora": {}}, "engine": {"name": "tinker"}, "method": method}
    check_config(RunConfig.model_validate(toy_settings(tiny_model, **sections)))


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (None, DamagedError, "tinker.json"),
        ("{", DamagedError, "is damaged"),
        ('{"path": "x"}', DamagedError, "has no 'base_model'"),
        ({"version": "3"}, DamagedError, "a value is of the wrong kind"),
        ({"base_model": "other"}, UserError, "is of the base model 'other'"),
    ],
)
def test_damaged_and_foreign_checkpoints_are_refused(
    server: FakeServer, tmp_path: Path, content: Any, kind: type[Exception], words: str
) -> None:
    whole = {"path": "tinker://x", "base_model": str(server.folder), "version": 3, "student_moved": True}
    if content is not None:
        text = content if isinstance(content, str) else json.dumps({**whole, "teacher": None, **content})
        (tmp_path / "tinker.json").write_text(text)
    with pytest.raises(kind, match=words):
        asyncio.run(engine_of(server).load_state(tmp_path))
    (tmp_path / "tinker.json").unlink(missing_ok=True)
    (tmp_path / "engine.pt").touch()
    with pytest.raises(UserError, match=r"is of the embedded engine.*engine\.name=torch"):
        asyncio.run(engine_of(server).load_state(tmp_path))


# -- the key --------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_file_and_no_message(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server, listener = FakeServer(tiny_model), Listener()
    server.faults["sample"] = [http_error(500, f"key {KEY}")]
    sections: dict[str, Any] = {"model": {"lora": {"rank": 4}}, "engine": {"name": "tinker"}}
    config = RunConfig.model_validate(toy_settings(tiny_model, **sections, training={"iterations": 1}))
    engine = TinkerEngine(TinkerOptions(), engine_spec(config), server.connect)
    assert server.connections == [(None, KEY)]  # it does reach the SDK
    pair = Engine(engine, engine, "tinker", config.engine.provides())
    run = build(config, tmp_path, engine=pair, task_set=Toy())
    assert asyncio.run(train(run, listener))
    server.faults["optim_step"] = [http_error(500, f"key {KEY}")]
    with pytest.raises(EngineFailedError) as raised:
        asyncio.run(stepped(engine))
    run.close()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 3
    out = capfd.readouterr()
    seen = [*written, *(text.encode() for text in (str(raised.value), out.out, out.err, caplog.text, *listener.notes))]
    assert not any(KEY.encode() in text for text in seen)
    assert not any(KEY in str(record) for record in (*listener.iterations, config.model_dump()))


# -- downloads ------------------------------------------------------------------------------------------------------


def test_adapters_of_the_hosted_service_come_file_by_file(server: FakeServer, tmp_path: Path) -> None:
    """SDKs newer than 0.25 have addresses of files instead of an archive."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "adapter_config.json").write_text('{"target_modules": ["q_proj"]}')
    (source / "adapter_model.safetensors").write_bytes(b"weights")

    def download(urls: dict[str, str], to: str) -> Path:
        trainer = SimpleNamespace(save_weights_external=lambda name: SimpleNamespace(path=f"tinker://{name}"))
        rest = SimpleNamespace(get_external_weights_urls=lambda path: SimpleNamespace(urls=urls))
        connected = service.Service(TinkerOptions(), lambda address, key: (object(), rest))
        folder = tmp_path / to
        folder.mkdir()
        asyncio.run(adapters.download(connected, trainer, "v1", folder))
        return folder

    urls = {path.name: path.as_uri() for path in source.iterdir()}
    assert (download(urls, "out") / "adapter_model.safetensors").read_bytes() == b"weights"
    with pytest.raises(EngineFailedError, match=r"outside of the adapter's folder: '\.\./x'"):
        download({"../x": urls["adapter_config.json"]}, "escaped")
    with pytest.raises(EngineFailedError, match=r"no adapter in peft's format, but adapter_config\.json"):
        download({"adapter_config.json": urls["adapter_config.json"]}, "partial")
    with pytest.raises(EngineFailedError, match="could not be downloaded"):
        download({"adapter_config.json": (source / "missing").as_uri()}, "missing")
