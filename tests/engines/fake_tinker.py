"""A server of the Tinker protocol in this process, at the SDK's client seam: the embedded engine behind SDK types.

`FakeServer.connect` stands for the SDK's clients. A fault is given by the name of a call: the exceptions that its next
calls raise, ``LOST`` for a future that never ends, or a function of the answer.
"""

from __future__ import annotations

import asyncio
import copy
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import tinker
import torch
from tinker import types
from torch import Tensor

from skillsd.engines.base import SampleRequest, TokenSequence, TrainItem
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch.engine import TorchEngine
from skillsd.objective import CHOSEN, TokenLogprobs

LOST = "lost"
SEEDS = 1 << 31
"""Seeds of the protocol are below it."""

Fault = Exception | str | Callable[[Any], Any]


def http_error(status: int, text: str) -> tinker.APIStatusError:
    """What the SDK raises for an HTTP status. The request's headers hold the key."""
    request = httpx.Request("POST", "http://fake/api", headers={"X-API-Key": "tml-secret-of-the-test"})
    kind = {401: tinker.AuthenticationError, 404: tinker.NotFoundError, 422: tinker.UnprocessableEntityError}
    make: Any = kind.get(status, tinker.InternalServerError)
    return make(text, response=httpx.Response(status, request=request), body=None)


class SameSeeds(TorchEngine):
    """The embedded engine with seeds as the protocol transports them."""

    async def sample(self, request: SampleRequest) -> Any:
        return await super().sample(replace(request, seed=request.seed % SEEDS))


def adapter_engine(folder: Path, seed: int, rank: int, *, kind: type[TorchEngine] = TorchEngine, **options: Any) -> Any:
    """The embedded engine that a new adapter of the server is."""
    torch.manual_seed(seed)
    return kind(str(folder), device="cpu", lora=LoraOptions(rank=rank), **{"max_grad_norm": torch.inf, **options})


@dataclass
class FakeServer:
    """Adapters, saved weights and saved states.

    Attributes:
        sums: see `skillsd.engines.tinker.servers.Server`.
        most: adapters that it can hold.
        calls: names of the calls so far.
    """

    folder: Path
    sums: bool = True
    most: int = 40
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    connections: list[tuple[str | None, str]] = field(default_factory=list)
    adapters: int = 0
    saved: dict[str, Any] = field(default_factory=dict)
    closed: bool = False
    base: TorchEngine = field(init=False)

    def __post_init__(self) -> None:
        self.base = TorchEngine(str(self.folder), device="cpu")

    def connect(self, address: str | None, key: str) -> tuple[Any, Any]:
        self.connections.append((address, key))
        return _Service(self), _Rest(self)

    def answer(self, call: str, work: Callable[[], Any]) -> Future[Any]:
        """The future of a request, with the next fault of this call."""
        self.calls.append(call)
        future: Future[Any] = Future()
        fault = self.faults[call].pop(0) if self.faults.get(call) else None
        if isinstance(fault, Exception):
            future.set_exception(fault)
        elif fault != LOST:
            try:
                found = work()
                future.set_result(fault(found) if callable(fault) else found)
            except Exception as error:
                future.set_exception(error)
        return future

    def take(self, path: str) -> Any:
        if path not in self.saved:
            raise http_error(404, f"Checkpoint {path} not found")
        return copy.deepcopy(self.saved[path])


@dataclass
class _Rest:
    server: FakeServer

    def get_server_capabilities(self) -> Future[Any]:
        models = [types.SupportedModel(model_name=str(self.server.folder), max_context_length=400)]
        return self.server.answer(
            "get_server_capabilities", lambda: types.GetServerCapabilitiesResponse(supported_models=models)
        )

    def get_checkpoint_archive_url(self, run: str, checkpoint: str) -> Future[Any]:
        """As SDK 0.25 and SkyRL's server have it, ``target_modules: null`` included."""

        def pack() -> Any:
            engine = adapter_engine(self.server.folder, 0, 4)
            _put(engine, self.server.take(f"tinker://{run}/{checkpoint}"))
            where = self.server.folder.parent / "archive"
            engine.model.save_pretrained(where)  # type: ignore[operator]
            config = where / "adapter_config.json"
            lines = config.read_text(encoding="utf-8")
            start = lines.index('"target_modules": [')
            nulled = lines[:start] + '"target_modules": null' + lines[lines.index("]", start) + 1 :]
            with tarfile.open(where / "all.tar.gz", "w:gz") as files:
                files.add(where / "adapter_model.safetensors", "adapter_model.safetensors")
                info = tarfile.TarInfo("adapter_config.json")
                info.size = len(nulled.encode())
                files.addfile(info, io.BytesIO(nulled.encode()))
            return SimpleNamespace(url=(where / "all.tar.gz").as_uri())

        return self.server.answer("archive", pack)


@dataclass
class _Service:
    server: FakeServer

    def create_lora_training_client(self, base_model: str, rank: int, seed: int, train_unembed: bool) -> Future[Any]:
        assert base_model == str(self.server.folder)
        assert 0 <= seed < SEEDS
        assert not train_unembed
        return self.server.answer("create", lambda: _Trainer.new(self.server, adapter_engine, seed, rank))

    def create_training_client_from_state_with_optimizer(self, path: str) -> Future[Any]:
        def load() -> _Trainer:
            weights, optimiser, rank = self.server.take(path)
            trainer = _Trainer.new(self.server, adapter_engine, 0, rank)
            _put(trainer.engine, weights)
            trainer.engine.optimiser.load_state_dict(optimiser)
            return trainer

        return self.server.answer("load", load)

    def create_sampling_client(self, model_path: str | None = None, base_model: str | None = None) -> Future[Any]:
        assert (model_path is None) != (base_model is None)
        if model_path is None:
            return self.server.answer("sampler", lambda: _Sampler(self.server, self.server.base, {}))

        def load() -> _Sampler:
            weights = self.server.take(model_path)
            return _Sampler(self.server, adapter_engine(self.server.folder, 0, 4), weights)

        return self.server.answer("sampler", load)

    def close(self, status: str) -> Future[None]:
        assert status == "success"
        self.server.closed = True
        done: Future[None] = Future()
        done.set_result(None)
        return done


@dataclass
class _Sampler:
    server: FakeServer
    engine: TorchEngine
    weights: Mapping[str, Tensor]

    def sample(self, prompt: Any, num_samples: int, sampling_params: Any) -> Future[Any]:
        assert num_samples == 1
        p = sampling_params
        assert sorted(p.stop) == sorted(self.engine.stop_tokens)
        request = SampleRequest(tuple(prompt.to_ints()), p.max_tokens, seed=p.seed, temperature=p.temperature)

        def work() -> Any:
            with _using(self.engine, self.weights):
                found = asyncio.run(self.engine.sample(request))
            sequence = types.SampledSequence(
                stop_reason=found.stop_reason, sequence_id="s", _tokens_list=list(found.tokens),
                _logprobs_list=list(found.logprobs),
            )  # fmt: skip
            return types.SampleResponse(sequences=[sequence], prompt_cache_hit_tokens=len(request.tokens) // 2)

        return self.server.answer("sample", work)

    def compute_logprobs(self, prompt: Any) -> Future[Any]:
        tokens = tuple(prompt.to_ints())

        def work() -> list[float | None]:
            with _using(self.engine, self.weights):
                [found] = _score(self.engine, [_all_marked(tokens)])
            return [None, *found.tolist()]

        return self.server.answer("compute_logprobs", work)


@dataclass
class _Trainer:
    """An adapter in training."""

    server: FakeServer
    engine: TorchEngine
    rank: int
    sequences: int = 0  # since the last step

    @classmethod
    def new(cls, server: FakeServer, make: Callable[..., TorchEngine], seed: int, rank: int) -> _Trainer:
        if server.adapters == server.most:
            raise RuntimeError(f"Maximum number of LoRA adapters ({server.most}) reached")
        server.adapters += 1
        return cls(server, make(server.folder, seed, rank), rank)

    def forward(self, batch: Sequence[Any], loss: str) -> Future[Any]:
        assert loss == "cross_entropy"
        return self.server.answer("forward", lambda: self._outputs(batch))

    def forward_backward(self, batch: Sequence[Any], loss: str) -> Future[Any]:
        assert loss == "importance_sampling"

        def work() -> Any:
            outputs = self._outputs(batch)
            items = [self._item(datum) for datum in batch]
            self.engine._forward_backward(items, _importance_sampling, 1.0)
            self.sequences += len(batch)
            return outputs

        return self.server.answer("forward_backward", work)

    def _item(self, datum: Any) -> TrainItem:
        sequence = _sequence(datum)
        inputs = {name: datum.loss_fn_inputs[name].to_torch() for name in ("logprobs", "advantages")}
        if not self.server.sums:  # the mean over a sequence's tokens; that over sequences follows in the step
            inputs["advantages"] = inputs["advantages"] / len(sequence.mask[1:])
        return TrainItem(sequence, inputs)

    def _outputs(self, batch: Sequence[Any]) -> Any:
        found = _score(self.engine, [_sequence(datum) for datum in batch])
        outputs = [{"logprobs": types.TensorData.from_torch(one)} for one in found]
        return types.ForwardBackwardOutput(loss_fn_output_type="x", loss_fn_outputs=outputs, metrics={})

    def optim_step(self, params: Any) -> Future[Any]:
        def work() -> Any:
            engine = self.engine
            engine._max_grad_norm = params.grad_clip_norm or torch.inf
            engine.optimiser.adamw.param_groups[0] |= {"betas": (params.beta1, params.beta2), "eps": params.eps}
            if not self.server.sums:
                for parameter in engine.optimiser.parameters:
                    if parameter.grad is not None:
                        parameter.grad /= max(1, self.sequences)
            self.sequences = 0
            report = engine._step(params.learning_rate)
            return types.OptimStepResponse(metrics={"fake/grad_norm": report.grad_norm})

        return self.server.answer("optim_step", work)

    def save_state(self, name: str, ttl_seconds: int | None = None) -> Future[Any]:
        state = (_weights(self.engine), copy.deepcopy(self.engine.optimiser.state_dict()), self.rank)
        return self._save("save_state", f"tinker://fake/weights/{name}", state)

    def save_weights_for_sampler(self, name: str) -> Future[Any]:
        return self._save("save_weights", f"tinker://fake/{name}", _weights(self.engine))

    def save_weights_and_get_sampling_client(self) -> Future[Any]:
        return self.server.answer("publish", lambda: _Sampler(self.server, self.engine, _weights(self.engine)))

    def _save(self, call: str, path: str, content: Any) -> Future[Any]:
        def work() -> Any:
            assert path not in self.server.saved
            self.server.saved[path] = content
            return SimpleNamespace(path=path)

        return self.server.answer(call, work)


def _importance_sampling(student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    return -((student.chosen - signals["logprobs"]).exp() * signals["advantages"]).sum(), {}


def _sequence(datum: Any) -> TokenSequence:
    targets = datum.loss_fn_inputs["target_tokens"].to_torch().tolist()
    inputs = datum.model_input.to_ints()
    assert inputs[1:] == targets[:-1]
    return _all_marked((inputs[0], *targets))


def _all_marked(tokens: tuple[int, ...]) -> TokenSequence:
    return TokenSequence(tokens, (False, *[True] * (len(tokens) - 1)))


def _score(engine: TorchEngine, sequences: Sequence[TokenSequence]) -> list[Tensor]:
    """One by one, so that the log-probs of a sequence are the same bits in any company."""
    return [engine._logprobs([sequence], "student", 1.0, CHOSEN)[0].chosen for sequence in sequences]


def _weights(engine: TorchEngine) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.trainable.items()}


def _put(engine: TorchEngine, weights: Mapping[str, Tensor]) -> None:
    engine.forget_caches()
    with torch.no_grad():
        for name, weight in weights.items():
            engine.trainable[name].copy_(weight)


@contextmanager
def _using(engine: TorchEngine, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The engine with these weights for a moment."""
    before = _weights(engine)
    _put(engine, weights)
    try:
        yield
    finally:
        _put(engine, before)
