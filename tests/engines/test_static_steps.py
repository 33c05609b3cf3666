"""Static decode steps, run directly on the CPU, against plain ones, token by token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import tiny
from engines.schedules import Sampled, ids, play, run
from skillsd.engines.base import SampleRequest
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.forward import with_weights
from skillsd.engines.torch.static_plan import ATTENTION
from skillsd.engines.torch.static_steps import STEPS, WIDTHS, StaticSteps, bucket

Folder = Callable[[str], Path]

TOLERANCE = {"float32": 2e-5, "bfloat16": 0.15}
"""Of log-probs, nats. In bfloat16 both paths round many intermediate results, in different places."""


def _assert_same(ours: list[Sampled], theirs: list[Sampled], dtype: str) -> None:
    """The same tokens in float32. In bfloat16 up to a close choice, after which the episodes differ."""
    compared = 0
    for episode, expected in zip(ours, theirs, strict=True):
        for (token, logprob), (other, reference) in zip(episode, expected, strict=dtype == "float32"):
            if token != other:
                assert dtype == "bfloat16"
                break
            assert logprob == pytest.approx(reference, abs=TOLERANCE[dtype])
            compared += 1
    assert compared > 2 * len(ours)


def _both(folder: Path, **options: Any) -> list[TorchEngine]:
    """Engines with static and with plain steps."""
    engines = []
    for kind in ("static", "plain"):
        torch.manual_seed(0)  # new adapters are random
        engines.append(TorchEngine(str(folder), device="cpu", decode=kind, **options))  # type: ignore[arg-type]
    return engines


# -- same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["llama", "llama-untied", "qwen3", "qwen2-window", "mistral-window", "gemma3", "gpt2", "gpt-neox"]
)
def test_static_steps_agree_with_plain_ones(name: str, dtype: str, model_folder: Folder) -> None:
    """Grouped heads, windows, tied and untied heads, learnt positions; observations of many lengths; all temperatures;
    turns that end by any of 16 stop tokens or by their length; sessions that are evicted and come back."""
    static, plain = _both(model_folder(name), dtype=dtype, max_sessions=5)
    assert isinstance(static.decoders["student"].steps, StaticSteps)
    _assert_same(run(play(static, episodes=8)), run(play(plain, episodes=8)), dtype)


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-moe"])
def test_latent_attention_and_experts(name: str, model_folder: Folder) -> None:
    static, plain = _both(model_folder(name))
    _assert_same(run(play(static, episodes=5)), run(play(plain, episodes=5)), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_and_a_teacher_with_its_own_weights(dtype: str, model_folder: Folder) -> None:
    engines = _both(model_folder("llama"), dtype=dtype, lora=LoraOptions(rank=4), teacher_follows=False)
    found: list[dict[str, list[Sampled]]] = []
    for engine in engines:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # new adapters change nothing
            for parameter in engine.trainable.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        found.append({w: run(play(engine, episodes=5, weights=w)) for w in ("student", "teacher")})  # type: ignore[misc]
    assert found[0]["student"] != found[0]["teacher"]
    for weights in ("student", "teacher"):
        _assert_same(found[0][weights], found[1][weights], dtype)


@pytest.mark.parametrize("attention", ATTENTION)
def test_all_kinds_of_attention_agree(attention: str, model_folder: Folder) -> None:
    static, plain = _both(model_folder("mistral-window"))
    static.decoders["student"].steps._attention = attention  # type: ignore[attr-defined]
    _assert_same(run(play(static, episodes=6)), run(play(plain, episodes=6)), "float32")


def test_an_episode_samples_the_same_in_any_batch(model_folder: Folder) -> None:
    static, _ = _both(model_folder("llama"))
    together = run(play(static, episodes=9))
    for number in (0, 4, 8):

        async def alone(number: int = number) -> list[Sampled]:
            return await play(static, episodes=number + 1, only=number)

        (episode,) = run(alone())
        assert [token for token, _ in episode] == [token for token, _ in together[number]]


def test_weights_that_change_in_place(model_folder: Folder) -> None:
    """CUDA graphs read the weights where they were captured: no update, sync or restored checkpoint may move them."""
    static, plain = _both(model_folder("llama"), teacher_follows=False)
    assert static.teacher is not None

    def addresses() -> list[int]:
        assert static.teacher is not None
        return [tensor.data_ptr() for tensor in (*static.trainable.values(), *static.teacher.values())]

    before = addresses()
    for engine in (static, plain):
        run(play(engine, episodes=3))
        for parameter in engine.optimiser.masters:
            parameter.grad = torch.ones_like(parameter)
        asyncio.run(engine.step(0.01))
        asyncio.run(engine.sync_teacher(0.5))
    _assert_same(run(play(static, episodes=5)), run(play(plain, episodes=5)), "float32")
    _assert_same(*(run(play(e, episodes=5, weights="teacher")) for e in (static, plain)), "float32")
    asyncio.run(static.sync_teacher())
    assert addresses() == before


TURNS = st.lists(
    st.tuples(st.sampled_from([1, 2, 7, 8, 9, 20]), st.sampled_from([0, 1, 15, 16, 17, 40, 66])), min_size=1, max_size=3
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    episodes=st.lists(st.tuples(st.integers(0, 2), TURNS, st.integers(0, 3)), min_size=1, max_size=6),
    max_sessions=st.integers(1, 4),
)
def test_random_schedules_with_cancelled_requests(
    episodes: list[tuple[int, list[tuple[int, int]], int]], max_sessions: int, model_folder: Folder
) -> None:
    """Episodes that join late, wait for a row, are evicted, and are given up in the middle of a turn."""
    engine = _static(model_folder("llama"))
    engine.decoders["student"] = engine._decoder("student", "static", max_sessions)
    plain = _plain(model_folder("llama"))

    async def episode(number: int, prompt: int, turns: list[tuple[int, int]], pause: int) -> None:
        for _ in range(pause * number):
            await asyncio.sleep(0)
        tokens = ids(7 * prompt + 1, prompt)
        for turn, (most, observation) in enumerate(turns):
            request = SampleRequest(tokens, most, 10 * number + turn, (1.0, 0.7, 0.0)[turn], f"e{number}")
            sampling = asyncio.ensure_future(engine.sample(request))
            if pause == 3 and turn == 1:  # given up
                await asyncio.sleep(0)
                sampling.cancel()
                return
            sample = await sampling
            plain.check(request, sample, 2e-5)
            tokens = (*tokens, *sample.tokens, *ids(observation, turn))

    async def all_of_them() -> None:
        await asyncio.gather(*(episode(number, *each) for number, each in enumerate(episodes)))

    run(all_of_them())


_LOADED: dict[str, Any] = {}


def _static(folder: Path) -> TorchEngine:
    if "static" not in _LOADED:
        _LOADED["static"] = TorchEngine(str(folder), device="cpu", decode="static")
    return _LOADED["static"]


def _plain(folder: Path) -> tiny.Plain:
    if "plain" not in _LOADED:
        _LOADED["plain"] = tiny.Plain(folder)
    return _LOADED["plain"]


# -- what the host does ---------------------------------------------------------------------------------------------


def test_the_host_reads_once_for_several_tokens_and_never_runs_past_a_turns_length(model_folder: Folder) -> None:
    engine = TorchEngine(str(model_folder("llama")), device="cpu", decode="static")
    decoder = engine.decoders["student"]
    decoder.set_stop_tokens(frozenset())
    steps, counts = decoder.steps, []
    decode = steps.decode

    def counted(sessions: Any) -> Any:
        found = decode(sessions)
        counts.append([len(each) for each in found])
        return found

    steps.decode = counted  # type: ignore[method-assign]

    async def sample(*most: int) -> None:
        await asyncio.gather(*(engine.sample(SampleRequest(ids(9, n), m, n)) for n, m in enumerate(most)))

    run(sample(1, 1, 1))
    assert counts == [[1, 1, 1]]
    counts.clear()
    run(sample(2 * STEPS + 3))
    assert counts == [[STEPS], [STEPS], [3]]
    counts.clear()
    run(sample(3, STEPS))
    assert counts == [[3, 3], [STEPS - 3]]


def test_a_slot_that_has_stopped_does_nothing_more(model_folder: Folder) -> None:
    """Its tokens end at the stop token, its keys and values stay, and its neighbour goes on."""
    engine = TorchEngine(str(model_folder("llama")), device="cpu", decode="static")
    steps = engine.decoders["student"].steps
    for seed in range(20):
        request = SampleRequest(ids(9, seed), STEPS, seed, session="a")
        sample, other = run(_gather(engine, request, SampleRequest(ids(9, 99), STEPS, seed + 50, session="b")))
        session = engine.decoders["student"]._sessions["a"]
        assert session.cached == len(session.tokens) - 1
        written = steps.pool.keys[0][session.row].abs().sum(dim=(0, 2)) > 0
        if sample.stop_reason == "stop" and len(sample.tokens) < len(other.tokens):
            assert not written[session.cached : session.cached + 1].any()
            return
        engine.end_session("a")
        engine.end_session("b")
        engine.forget_caches()
        engine._release()
    raise AssertionError("no turn ended early")


async def _gather(engine: TorchEngine, *requests: SampleRequest) -> list[Any]:
    return list(await asyncio.gather(*(engine.sample(request) for request in requests)))


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "qwen3", "gemma3", "gpt-neox"])
def test_no_step_waits_for_the_device(name: str, model_folder: Folder) -> None:
    """On a device without memory, reading a value, a shape that depends on one, and CPU tensors are errors."""
    engine = TorchEngine(str(model_folder(name)), device="cpu", decode="static")
    steps = engine.decoders["student"].steps
    assert isinstance(steps, StaticSteps)
    meta = torch.device("meta")

    def pretended(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=meta)

    weights = {n: pretended(t) for n, t in (*engine.model.named_parameters(), *engine.model.named_buffers())}
    for attribute in ("_stops", "_state", "_results", "_new"):
        setattr(steps, attribute, pretended(getattr(steps, attribute)))
    network = replace(engine._student, run=with_weights(engine.model, weights))
    steps.device, steps.pool.device, steps.forward = meta, meta, network.decode
    with torch.inference_mode():
        steps.reserve(8, 100)
        steps._decode_step(8, 1, 64)
        steps._prefill_step(4, WIDTHS[0], 128)
    assert steps.pool.keys[0].device == meta
    for waiting in (lambda state: state[0, 0].item(), lambda state: state[state > 0], lambda state: state + ONE):
        with pytest.raises((RuntimeError, NotImplementedError)):  # the check works
            waiting(steps._state)


ONE = torch.ones(1, dtype=torch.long)
"""Of another device than the pretended one."""


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 33, 49, 65, 97, 129)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 16, 48, 64, 96, 128, 192,
    ]  # fmt: skip
    rng = random.Random(0)
    for _ in range(200):
        size = rng.randint(1, 10**6)
        assert size <= bucket(size) <= max(1.5 * size, size + 1)
