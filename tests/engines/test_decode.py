"""The decoder against plain forward passes, token by token, whatever the schedule of requests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from engines.tiny import STOPS, Plain
from skillsd.engines.base import Sample, SampleRequest
from skillsd.engines.torch.attention import Plan
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.sampling import choose
from skillsd.engines.torch.static_steps import Kind
from skillsd.engines.torch.steps import PREFILL_ALONE_TOKENS, Decoded

Engines = Callable[..., tuple[TorchEngine, Plain]]


@pytest.fixture(scope="module")
def loaded(model_folder: Callable[[str], Path]) -> Callable[[str], tuple[TorchEngine, Plain]]:
    @cache
    def load(name: str) -> tuple[TorchEngine, Plain]:
        folder = model_folder(name)
        return TorchEngine(str(folder), device="cpu"), Plain(folder)

    return load


def _engines(loaded: Callable[[str], tuple[TorchEngine, Plain]], kind: Kind) -> Engines:
    def engine(name: str = "llama", *, max_sessions: int = 256) -> tuple[TorchEngine, Plain]:
        """An engine with a new decoder; its weights are shared with other tests."""
        engine, plain = loaded(name)
        engine.decoders["student"] = engine._decoder("student", kind, max_sessions)
        return engine, plain

    return engine


@pytest.fixture(params=["plain", "static"])
def engine_of(request: pytest.FixtureRequest, loaded: Callable[[str], tuple[TorchEngine, Plain]]) -> Engines:
    return _engines(loaded, request.param)


@pytest.fixture
def plain_engine_of(loaded: Callable[[str], tuple[TorchEngine, Plain]]) -> Engines:
    """Whose passes have no padding, so that their tokens can be counted."""
    return _engines(loaded, "plain")


def _ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(30, 256), k=count))


def _run(*episodes: Coroutine[Any, Any, Any]) -> list[Any]:
    async def run() -> list[Any]:
        async with asyncio.timeout(60):  # fail, don't hang, if a request is never answered
            return list(await asyncio.gather(*episodes))

    return asyncio.run(run())


@contextmanager
def _tokens_forwarded(engine: TorchEngine) -> Iterator[list[int]]:
    """The number of tokens in each forward pass of decoding."""
    steps, counts = engine.decoders["student"].steps, []
    forward = steps.forward

    def counted(ids: Tensor, plan: Plan, places: Tensor | None) -> Tensor:
        counts.append(len(ids))
        return forward(ids, plan, places)

    steps.forward = counted
    yield counts
    steps.forward = forward


async def _episode(
    engine: TorchEngine,
    plain: Plain,
    name: str | None,
    prompt: tuple[int, ...],
    turns: list[tuple[int, int]],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    delay: Callable[[], float] | None = None,
) -> list[int]:
    """Play `turns` of (max_tokens, tokens of the observation) and compare each sample with the plain model's."""
    tokens = list(prompt)
    for turn, (max_tokens, observation) in enumerate(turns):
        request = SampleRequest(tuple(tokens), max_tokens, seed * 100 + turn, temperature, name)
        sample = await engine.sample(request)
        plain.check(request, sample)
        tokens += [*sample.tokens, *_ids(observation, seed * 100 + turn)]
        if delay is not None:
            await asyncio.sleep(delay())
    if name is not None:
        engine.end_session(name)
    return tokens


# -- same tokens as the plain model -----------------------------------------------------------------------------

RAGGED = [
    # Length and seed of the prompt, turns. Observations and prompts on both sides of PREFILL_ALONE_TOKENS, shared
    # prompts and others.
    (40, 0, [(6, 5), (9, PREFILL_ALONE_TOKENS + 20), (4, 1), (7, 0), (5, 3)]),
    (40, 0, [(3, 11), (3, 2), (12, PREFILL_ALONE_TOKENS + 1), (2, 0)]),
    (40, 0, [(1, 0), (1, 0), (1, 30), (15, 0)]),
    (PREFILL_ALONE_TOKENS + 33, 1, [(8, 2), (8, 80), (8, 2)]),
    (PREFILL_ALONE_TOKENS + 33, 1, [(20, 90), (2, 2)]),
    (1, 2, [(10, 4), (10, 4), (10, 4)]),
    (1, 2, [(12, 4)]),
    (2, 3, [(5, 70), (5, 70)]),
    (17, 4, [(30, 1)]),
]


@pytest.mark.parametrize("max_sessions", [1, 3, 256])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
def test_ragged_batches(name: str, max_sessions: int, engine_of: Engines) -> None:
    """Different lengths, prompts and temperatures. With few rows, episodes are evicted and prefilled again often."""
    engine, plain = engine_of(name, max_sessions=max_sessions)
    _run(
        *(
            _episode(
                engine,
                plain,
                f"e{n}",
                _ids(length, seed),
                turns,
                seed=n,
                temperature=[1.0, 0.0, 0.6, 1.7][n % 4],
            )
            for n, (length, seed, turns) in enumerate(RAGGED)
        )
    )
    decoder = engine.decoders["student"]
    assert not decoder._rows
    assert not decoder._sessions
    assert decoder.steps.pool.rows <= 2 * max_sessions


@pytest.mark.parametrize("max_sessions", [2, 5, 256])
def test_requests_join_and_leave_at_any_step(max_sessions: int, plain_engine_of: Engines) -> None:
    """Slow environments: rows of idle sessions between busy ones are swapped, removed and reused."""
    engine, plain = plain_engine_of(max_sessions=max_sessions)
    rng = random.Random(3)
    with _tokens_forwarded(engine) as counts:
        _run(
            *(
                _episode(
                    engine,
                    plain,
                    f"e{n}" if n % 5 else None,
                    _ids(5 + n % 3, n % 3),
                    [(rng.randint(1, 12), rng.randint(0, 9)) for _ in range(6)],
                    seed=n,
                    delay=lambda: rng.choice([0.0, 0.0, 0.001, 0.01]),
                )
                for n in range(14)
            )
        )
    assert len(set(counts)) > 3  # the batch really changed its size


TURNS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 12)), min_size=1, max_size=4)
EPISODES = st.lists(st.tuples(st.integers(1, 3), TURNS, st.integers(0, 3)), min_size=1, max_size=7)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(episodes=EPISODES, max_sessions=st.integers(1, 6), seed=st.integers(0, 9))
def test_random_schedules(
    episodes: list[tuple[int, list[tuple[int, int]], int]], max_sessions: int, seed: int, engine_of: Engines
) -> None:
    engine, plain = engine_of(max_sessions=max_sessions)

    async def paced(n: int, prompt: int, turns: list[tuple[int, int]], pause: int) -> None:
        for _ in range(pause * n):
            await asyncio.sleep(0)  # join some steps later
        await _episode(engine, plain, f"e{n}", _ids(6 * prompt, prompt), turns, seed=seed + n, delay=lambda: 0)

    _run(*(paced(n, *episode) for n, episode in enumerate(episodes)))


def test_a_session_may_go_on_without_an_observation(engine_of: Engines) -> None:
    engine, plain = engine_of()
    _run(_episode(engine, plain, "e", _ids(9, 0), [(3, 0), (3, 0), (3, 0)]))


# -- no work is done twice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [20, PREFILL_ALONE_TOKENS + 40])
def test_the_prompt_of_a_group_is_prefilled_once(length: int, plain_engine_of: Engines) -> None:
    engine, plain = plain_engine_of()
    with _tokens_forwarded(engine) as counts:
        _run(*(_episode(engine, plain, f"e{n}", _ids(length, n % 2), [(1, 0)], seed=n) for n in range(8)))
    # Two prompts without their last token; then one token for each episode.
    assert counts == [2 * (length - 1), 8]


def test_a_late_member_of_a_group_copies_the_prompts_cache(plain_engine_of: Engines) -> None:
    """Even from a member that is many turns ahead."""
    engine, plain = plain_engine_of()
    prompt = _ids(30, 0)

    async def run() -> None:
        early = asyncio.ensure_future(_episode(engine, plain, "early", prompt, [(4, 9)] * 20))
        while len(counts) < 20:
            await asyncio.sleep(0)
        assert not early.done()
        before = sum(counts)
        request = SampleRequest(prompt, 1, seed=5, session="late")
        plain.check(request, await engine.sample(request))
        assert sum(counts) - before <= 1 + 2 * 10  # its one token, and a step or two of the other episode's
        await early

    with _tokens_forwarded(engine) as counts:
        _run(run())


def test_keys_and_values_are_kept_between_turns(plain_engine_of: Engines) -> None:
    engine, plain = plain_engine_of()
    turns = [(5, 7), (5, PREFILL_ALONE_TOKENS + 9), (5, 3)]
    with _tokens_forwarded(engine) as counts:
        (tokens,) = _run(_episode(engine, plain, "e", _ids(25, 0), turns))
    assert sum(counts) == len(tokens) - 3 - 1  # once each; not the last observation and the last sampled token


def test_only_an_evicted_session_is_prefilled_again(plain_engine_of: Engines) -> None:
    engine, plain = plain_engine_of(max_sessions=1)

    async def run() -> None:
        a = SampleRequest(_ids(20, 0), 4, seed=0, session="a")
        first = await engine.sample(a)
        b = SampleRequest(_ids(10, 1), 4, seed=0, session="b")
        plain.check(b, await engine.sample(b))  # takes the only row
        counts.clear()
        again = replace(a, tokens=(*a.tokens, *first.tokens, 40), seed=1)
        plain.check(again, await engine.sample(again))
        assert counts[0] == len(again.tokens) - 1

    with _tokens_forwarded(engine) as counts:
        _run(run())


def test_the_least_recently_used_session_is_evicted(engine_of: Engines) -> None:
    engine, _ = engine_of(max_sessions=2)

    async def run() -> None:
        tokens = {name: _ids(8, n) for n, name in enumerate("abc")}
        for name in ("a", "b", "a", "c"):
            sample = await engine.sample(SampleRequest(tokens[name], 2, seed=0, session=name))
            tokens[name] += sample.tokens
        assert set(engine.decoders["student"]._sessions) == {"a", "c"}

    _run(run())


def test_the_pool_grows_with_what_it_holds(plain_engine_of: Engines) -> None:
    engine, plain = plain_engine_of()
    pool = engine.decoders["student"].steps.pool
    sizes = []
    for rows, length in ((1, 5), (3, 5), (3, 200), (7, 250)):
        _run(*(_episode(engine, plain, f"e{n}", _ids(length, n), [(3, 2), (3, 2)], seed=n) for n in range(rows)))
        sizes.append((pool.rows, pool.capacity))
        assert pool.bytes() == 2 * 2 * pool.rows * 2 * pool.capacity * 8 * 4  # keys+values, layers, heads, dim, float
    assert sizes == sorted(sizes)
    assert sizes[0] == (1, 64)
    assert sizes[-1][0] >= 7
    assert sizes[-1][1] >= 250 + 10


def test_a_row_can_be_reused_before_the_pool_has_grown(plain_engine_of: Engines) -> None:
    """Two new episodes in one step: one gets a row beyond the pool, the other evicts a session and moves that row."""
    engine, plain = plain_engine_of(max_sessions=3)

    async def run() -> None:
        first = [SampleRequest(_ids(9, n), 3, seed=n, session=f"old{n}") for n in range(2)]
        await asyncio.gather(*(engine.sample(request) for request in first))
        assert engine.decoders["student"].steps.pool.rows == 2
        new = [SampleRequest(_ids(9, 5 + n), 3, seed=n, session=f"new{n}") for n in range(2)]
        for request, sample in zip(new, await asyncio.gather(*(engine.sample(r) for r in new)), strict=True):
            plain.check(request, sample)

    _run(run())


# -- cancellation and failures -------------------------------------------------------------------------------


def test_a_cancelled_request_leaves_the_batch(engine_of: Engines) -> None:
    engine, plain = engine_of()
    others = [(40, 3), (20, 2)]
    prompt = _ids(12, 0)

    async def gives_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await engine.sample(SampleRequest(prompt, 400, seed=9, session="gone", temperature=1.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert "gone" not in engine.decoders["student"]._sessions
        # The name is free, and the partial sample is gone.
        await _episode(engine, plain, "gone", prompt, [(5, 2), (5, 2)], seed=11)

    engine.decoders["student"].set_stop_tokens(frozenset())  # otherwise it might end before the timeout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.tiny.STOPS", ())
        _run(
            gives_up(),
            *(_episode(engine, plain, f"e{n}", _ids(9 + n, n), others, seed=n) for n in range(5)),
        )


def test_a_request_cancelled_in_the_queue_is_never_begun(plain_engine_of: Engines) -> None:
    engine, plain = plain_engine_of(max_sessions=1)

    async def run() -> None:
        busy = asyncio.ensure_future(_episode(engine, plain, "busy", _ids(9, 0), [(30, 0)]))
        queued = asyncio.ensure_future(engine.sample(SampleRequest(_ids(9, 1), 30, seed=0)))
        for _ in range(4):
            await asyncio.sleep(0)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        tokens = await busy
        for _ in range(4):
            await asyncio.sleep(0)
        assert not engine.decoders["student"]._queue
        assert sum(counts) == len(tokens) - 1  # no token of the cancelled request

    with _tokens_forwarded(engine) as counts:
        _run(run())


def test_weights_may_change_once_pending_requests_are_cancelled(engine_of: Engines) -> None:
    engine, plain = engine_of()

    async def run() -> None:
        waiting = asyncio.ensure_future(engine.sample(SampleRequest(_ids(9, 0), 300, seed=0, session="a")))
        for _ in range(4):
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="while a request was being sampled"):
            engine.decoders["student"].clear()
        waiting.cancel()
        engine.decoders["student"].clear()
        await _episode(engine, plain, "a", _ids(9, 1), [(5, 3), (5, 3)])

    _run(run())


def test_ending_a_session_fails_its_pending_request(engine_of: Engines) -> None:
    engine, plain = engine_of()

    async def run() -> None:
        waiting = asyncio.ensure_future(engine.sample(SampleRequest(_ids(9, 0), 300, seed=0, session="a")))
        other = asyncio.ensure_future(_episode(engine, plain, "b", _ids(9, 1), [(20, 3), (5, 3)]))
        for _ in range(4):
            await asyncio.sleep(0)
        engine.end_session("a")
        with pytest.raises(RuntimeError, match="ended"):
            await waiting
        await other

    _run(run())


def test_one_request_at_a_time_in_a_session(engine_of: Engines) -> None:
    engine, plain = engine_of()

    async def run() -> None:
        request = SampleRequest(_ids(9, 0), 10, seed=0, session="a")
        first, second = await asyncio.gather(engine.sample(request), engine.sample(request), return_exceptions=True)
        assert isinstance(first, Sample)
        plain.check(request, first)
        assert isinstance(second, ValueError)
        assert "under way" in str(second)

    _run(run())


def test_a_decoding_failure_fails_all_requests_and_the_next_ones_work(engine_of: Engines) -> None:
    engine, plain = engine_of(max_sessions=2)
    decoder = engine.decoders["student"]
    forward, calls = decoder.steps.forward, []

    def failing(ids: Tensor, plan: Plan, places: Tensor | None) -> Tensor:
        calls.append(None)
        logits = forward(ids, plan, places)
        if len(calls) == 4:
            for states in decoder.steps.pool.keys.values():
                states.fill_(torch.nan)  # the failed pass may have left anything there
            raise RuntimeError("out of memory")
        return logits

    async def run() -> None:
        decoder.steps.forward = failing
        requests = [SampleRequest(_ids(9, n), 50, seed=n, session=f"e{n}") for n in range(4)]  # two of them queued
        ends = await asyncio.gather(*(engine.sample(r) for r in requests), return_exceptions=True)
        assert len(calls) == 4
        assert all(isinstance(end, RuntimeError) and "out of memory" in str(end) for end in ends), ends
        decoder.steps.forward = forward
        await asyncio.gather(
            *(_episode(engine, plain, f"e{n}", _ids(9 + n, n), [(6, 4), (6, 4)], seed=n) for n in range(4))
        )

    _run(run())


def test_an_event_loop_that_ends_early_leaves_nothing_behind(engine_of: Engines) -> None:
    engine, plain = engine_of()

    async def abandoned() -> None:
        asyncio.ensure_future(engine.sample(SampleRequest(_ids(9, 0), 400, seed=0, session="a")))  # noqa: RUF006
        for _ in range(5):
            await asyncio.sleep(0)

    asyncio.run(abandoned())
    _run(_episode(engine, plain, "a", _ids(9, 0), [(6, 4), (6, 4)]))


def test_a_run_is_deterministic_to_the_bit(engine_of: Engines) -> None:
    def once() -> list[list[float]]:
        engine, plain = engine_of(max_sessions=4)
        seen: list[list[float]] = []
        sample = engine.decoders["student"].sample

        async def recorded(request: SampleRequest) -> Decoded:
            tokens, logprobs, stopped = await sample(request)
            seen.append([*tokens, *logprobs])
            return tokens, logprobs, stopped

        engine.decoders["student"].sample = recorded  # type: ignore[method-assign]
        _run(*(_episode(engine, plain, f"e{n}", _ids(8, n % 3), [(6, 4)] * 3, seed=n) for n in range(7)))
        return seen

    assert once() == once()


# -- choosing ------------------------------------------------------------------------------------------------


def test_choose_follows_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 2
    logits[0, 3] = -torch.inf  # impossible
    rng = random.Random(0)
    draws = 20_000
    for temperature in (0.5, 1.0, 2.0):
        tokens, logprobs = choose(logits.expand(draws, -1), [temperature] * draws, [rng.random() for _ in range(draws)])
        expected = (logits[0] / temperature).softmax(-1)
        possible = [t for t in range(12) if expected[t] * draws >= 5]
        counts = torch.bincount(torch.tensor(tokens), minlength=12)
        assert counts[3] == 0
        observed = [*counts[possible].tolist(), draws - int(counts[possible].sum())]
        wanted = [*(expected[possible].double() * draws).tolist()]
        wanted.append(draws - sum(wanted))
        if wanted[-1] < 1:  # the rest is too rare to test
            observed, wanted = observed[:-1], [w * sum(observed[:-1]) / sum(wanted[:-1]) for w in wanted[:-1]]
        assert chisquare(observed, wanted).pvalue > 1e-3
        assert torch.allclose(torch.tensor(logprobs).exp(), expected[tokens], rtol=1e-4)


def test_choose_at_the_edges() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    nearly_one = 1 - 2**-53
    assert choose(logits, [1.0], [0.0])[0] == [1]  # not the impossible first token
    assert choose(logits, [1.0], [nearly_one - 2**-50])[0] == [2]
    assert choose(logits, [1e-3], [0.5])[0] == [2]


def test_choose_mixes_temperatures() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 50)
    temperatures, uniforms = [0.0, 1.0, 0.0, 0.3], [0.9, 0.9, 0.1, 0.5]
    tokens, logprobs = choose(logits, temperatures, uniforms)
    for row in range(4):  # each row as if alone
        alone = choose(logits[row : row + 1], temperatures[row : row + 1], uniforms[row : row + 1])
        assert (tokens[row], logprobs[row]) == (alone[0][0], alone[1][0])
    assert tokens[0] == logits[0].argmax()
    assert tokens[2] == logits[2].argmax()
    assert logprobs[0] == pytest.approx(logits[0].log_softmax(-1).max().item())  # at temperature 1


def test_choose_keeps_rare_tokens_of_a_large_vocabulary() -> None:
    """The error of a running sum in float32 over 150k tokens exceeds the probability of the last ones."""
    logits, drawn = torch.zeros(1, 150_000), range(0, 150_000, 4999)
    for inside in (0.001, 0.999):  # of the token's own interval in [0, 1)
        uniforms = [(token + inside) / 150_000 for token in drawn]
        tokens, _ = choose(logits.expand(len(uniforms), -1), [1.0] * len(uniforms), uniforms)
        assert tokens == list(drawn)


def test_greedy_takes_the_most_likely(engine_of: Engines) -> None:
    engine, plain = engine_of()
    prompt = _ids(15, 0)
    samples = _run(*(engine.sample(SampleRequest(prompt, 10, seed=n, temperature=0.0)) for n in range(3)))
    assert samples[0].tokens == samples[1].tokens == samples[2].tokens  # the seed has no effect
    whole = [*prompt, *samples[0].tokens]
    best = plain.logits(whole)[len(prompt) - 1 : -1].argmax(-1)
    assert best.tolist() == list(samples[0].tokens)


def test_stop_tokens_end_a_turn_and_are_part_of_it(engine_of: Engines) -> None:
    engine, _ = engine_of()
    samples = _run(*(engine.sample(SampleRequest(_ids(5, n), 60, seed=n)) for n in range(20)))
    assert {sample.stop_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert (sample.tokens[-1] in STOPS) == (sample.stop_reason == "stop")
