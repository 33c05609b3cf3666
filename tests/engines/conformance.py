"""What every engine has to keep of the contract in `skillsd.engines.base`, through its six calls alone.

`CHECKS` are functions of a `Subject`: a factory of engines, all with the same weights, and how exact they are. Run them
for an engine with `pytest.mark.parametrize("check", CHECKS)`; see `test_conformance.py`.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor

from skillsd.engines.base import (
    Engine,
    Sample,
    SampleRequest,
    StaleTeacherError,
    StepReport,
    TokenSequence,
    TrainItem,
)
from skillsd.metrics import Mean
from skillsd.objective import TokenLogprobs


class Make(Protocol):
    def __call__(self, *, teacher_follows: bool = True, micro_batch_tokens: int = 8192) -> Engine:
        """A new engine; every call gives the same weights. A teacher that does not follow is a snapshot."""
        ...


@dataclass(frozen=True)
class Subject:
    """An engine under test.

    Attributes:
        make: the factory.
        reference: token ids -> log-probs ``[tokens, vocabulary]`` of a new engine's weights, computed plainly.
        tolerance: of a log-prob, between two ways to compute it.
        relative: of a gradient's norm, between two ways to sum it.
        batch_invariant: whether rounding is small enough that the same tokens are sampled in any company.
    """

    make: Make
    reference: Callable[[Sequence[int]], Tensor]
    tolerance: float = 1e-5
    relative: float = 1e-4
    batch_invariant: bool = True


VOCABULARY = 256
Loss = Callable[[Tensor], Tensor]


def _ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(30, VOCABULARY), k=count))


def _sequences(lengths: Sequence[int] = (12, 3, 30, 7, 30, 19)) -> list[TokenSequence]:
    """Ragged, each marked in several stretches, the very last and the first possible place among them."""
    sequences = []
    for number, length in enumerate(lengths):
        mask = [False, True] + [(place // 3 + number) % 2 == 0 for place in range(2, length - 1)] + [True]
        sequences.append(TokenSequence(_ids(length, number), tuple(mask[:length])))
    return sequences


def _weighted(logprobs: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Mean]]:
    loss = -(signals["weight"] * logprobs.chosen).sum()
    return loss, {"loss": Mean(loss.item(), len(logprobs.chosen))}


def _batch(sequences: Sequence[TokenSequence] | None = None, scale: float = 1.0) -> list[TrainItem]:
    """Weights of both signs, as advantages have, normalised by the global count of tokens."""
    chosen = _sequences() if sequences is None else sequences
    total = sum(s.marked for s in chosen)
    generator = torch.Generator().manual_seed(7)
    return [
        TrainItem(s, {"weight": (torch.rand(s.marked, generator=generator) * 2 - 0.5) * scale / total}) for s in chosen
    ]


def _train(engine: Engine, steps: int = 1, learning_rate: float = 1e-2, scale: float = 1.0) -> list[StepReport]:
    reports = []
    for _ in range(steps):
        engine.forward_backward(_batch(scale=scale), _weighted)
        reports.append(engine.step(learning_rate))
    return reports


def _view(engine: Engine, weights: str = "student") -> Tensor:
    """What can be seen of the weights: every log-prob at every marked place, ``[marked, vocabulary]``."""
    return torch.cat(engine.score(_sequences(), weights, distribution=True))  # type: ignore[arg-type]


def _gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _sample_all(engine: Engine, requests: Sequence[SampleRequest]) -> list[Sample]:
    async def run() -> list[Sample]:
        return list(await asyncio.gather(*(engine.sample(request) for request in requests)))

    return asyncio.run(run())


# -- sampling ---------------------------------------------------------------------------------------------------


def seed_determines_the_sample(subject: Subject) -> None:
    engine = subject.make()
    requests = [SampleRequest(_ids(5 + 9 * n, n % 3), 12, seed=n, temperature=0.7 + n / 10) for n in range(6)]
    alone = [_sample_all(engine, [request])[0] for request in requests]
    assert alone == [_sample_all(engine, [request])[0] for request in requests]
    other_seeds = _sample_all(engine, [replace(request, seed=request.seed + 100) for request in requests])
    assert all(a.tokens != b.tokens for a, b in zip(alone, other_seeds, strict=True))
    if subject.batch_invariant:
        for company in (requests, requests[::-1]):
            for request, sample in zip(company, _sample_all(engine, company), strict=True):
                expected = alone[request.seed]
                assert sample.tokens == expected.tokens
                assert sample.stop_reason == expected.stop_reason
                assert sample.logprobs == pytest.approx(expected.logprobs, abs=subject.tolerance)


def same_request_twice_at_once(subject: Subject) -> None:
    request = SampleRequest(_ids(9, 1), 6, seed=3)
    one, other = _sample_all(subject.make(), [request, request])
    if subject.batch_invariant:
        assert one.tokens == other.tokens


def sampled_logprobs_are_scored_logprobs(subject: Subject) -> None:
    """Over several turns of a session, at several temperatures, together with other sessions."""
    engine = subject.make()

    async def episode(number: int, temperature: float) -> tuple[TokenSequence, list[float]]:
        tokens, mask, logprobs = list(_ids(8 + 5 * number, 0)), [False] * (8 + 5 * number), []
        for turn in range(3):
            request = SampleRequest(
                tuple(tokens), 9, seed=number * 10 + turn, temperature=temperature, session=str(number)
            )
            sample = await engine.sample(request)
            observation = _ids(3 + 4 * number, turn)
            tokens += [*sample.tokens, *observation]
            mask += [True] * len(sample.tokens) + [False] * len(observation)
            logprobs += sample.logprobs
        engine.end_session(str(number))
        return TokenSequence(tuple(tokens), tuple(mask)), logprobs

    async def run(temperature: float) -> list[tuple[TokenSequence, list[float]]]:
        return list(await asyncio.gather(*(episode(number, temperature) for number in range(4))))

    for temperature in (1.0, 0.2):
        episodes = asyncio.run(run(temperature))
        scored = engine.score([sequence for sequence, _ in episodes], temperature=temperature)
        for (_, logprobs), score in zip(episodes, scored, strict=True):
            # Rounding in a logit counts 1 / temperature times.
            assert _gap(torch.tensor(logprobs), score) <= subject.tolerance / min(1.0, temperature)


def bad_requests_are_refused(subject: Subject) -> None:
    engine = subject.make()
    prompt = _ids(6, 0)

    async def run() -> None:
        async def refused(request: SampleRequest, words: str) -> None:
            with pytest.raises(ValueError, match=words):
                await engine.sample(request)

        await refused(SampleRequest((), 4, seed=0), "at least one token")
        await refused(SampleRequest(prompt, 0, seed=0), "at least one token")
        await refused(SampleRequest(prompt, engine.max_length - 5, seed=0), str(engine.max_length))
        first = await engine.sample(SampleRequest(prompt, 4, seed=0, session="a"))
        held = (*prompt, *first.tokens)
        await refused(SampleRequest((prompt[0] + 1, *held[1:], 40), 4, seed=1, session="a"), "extend")
        await refused(SampleRequest(prompt, 4, seed=1, session="a"), "extend")
        # None of which harms the session, or others.
        again = await engine.sample(SampleRequest((*held, 40), 4, seed=1, session="a"))
        fresh = await engine.sample(SampleRequest((*held, 40), 4, seed=1))
        if subject.batch_invariant:
            assert again.tokens == fresh.tokens
        engine.end_session("a")
        engine.end_session("never heard of")
        await engine.sample(SampleRequest(prompt, 4, seed=0, session="a"))  # the name is free again

    asyncio.run(run())


# -- scoring ----------------------------------------------------------------------------------------------------


def score_reads_every_marked_position(subject: Subject) -> None:
    engine, sequences = subject.make(), _sequences()
    chosen = engine.score(sequences, temperature=0.5)
    full = engine.score(sequences, temperature=0.5, distribution=True)
    for sequence, some, whole in zip(sequences, chosen, full, strict=True):
        places = [place for place, marked in enumerate(sequence.mask) if marked]
        plain = subject.reference(sequence.tokens)[[place - 1 for place in places]]
        plain = (plain / 0.5).log_softmax(-1)
        assert some.shape == (len(places),)
        assert some.dtype == whole.dtype == torch.float32
        assert some.device.type == "cpu"
        assert _gap(whole, plain) <= 2 * subject.tolerance
        assert torch.equal(some, whole.gather(1, torch.tensor([[sequence.tokens[place]] for place in places]))[:, 0])


def order_and_micro_batches_do_not_matter_to_scores(subject: Subject) -> None:
    sequences = _sequences()
    sequences.insert(2, TokenSequence(_ids(4, 99), (False,) * 4))  # nothing wanted of this one
    expected = subject.make().score(sequences)
    assert expected[2].numel() == 0
    for budget in (1, 40, 10_000):
        engine = subject.make(micro_batch_tokens=budget)
        backwards = engine.score(sequences[::-1])[::-1]
        for ours, theirs in zip(backwards, expected, strict=True):
            assert ours.shape == theirs.shape
            assert ours.numel() == 0 or _gap(ours, theirs) <= subject.tolerance
    assert subject.make().score([]) == []


def top_k_is_the_head_of_the_distribution(subject: Subject) -> None:
    engine, sequences = subject.make(micro_batch_tokens=40), _sequences()
    sequences.insert(2, TokenSequence(_ids(4, 99), (False,) * 4))  # nothing wanted of this one
    full = engine.score(sequences, temperature=0.5, distribution=True)
    chosen = engine.score(sequences, temperature=0.5)
    for k in (1, 7):
        tops = engine.score_top_k(sequences, k, temperature=0.5)
        plainly = Engine.score_top_k(engine, sequences, k, temperature=0.5)
        assert len(tops) == len(sequences)
        for sequence, top, plain, whole, own in zip(sequences, tops, plainly, full, chosen, strict=True):
            assert top.ids.dtype == torch.int64
            assert top.logprobs.dtype == torch.float32
            assert top.ids.device.type == top.logprobs.device.type == top.chosen.device.type == "cpu"
            for ours, theirs in ((top.chosen, plain.chosen), (top.ids, plain.ids), (top.logprobs, plain.logprobs)):
                assert ours.shape == theirs.shape
            assert top.chosen.shape == (sequence.marked,)
            assert top.ids.shape == (sequence.marked, k)
            assert top.logprobs.shape == (sequence.marked, k + 1)
            if not sequence.marked:
                continue
            assert _gap(top.chosen, own) <= subject.tolerance
            assert _gap(plain.chosen, own) <= 2 * subject.tolerance
            best = whole.sort(dim=1, descending=True).values
            # Two tokens that are nearly as likely may change places.
            for logprobs in (top.logprobs, plain.logprobs):
                assert _gap(logprobs[:, :k], best[:, :k]) <= 2 * subject.tolerance
                assert _gap(logprobs[:, k], best[:, k:].logsumexp(1)) <= 2 * subject.tolerance
            assert _gap(top.logprobs[:, :k], whole.gather(1, top.ids)) <= 2 * subject.tolerance
            assert all(len(set(row)) == k for row in top.ids.tolist())
    width = full[0].shape[1]
    for k in (0, width, width + 1):
        for score in (engine.score_top_k, partial(Engine.score_top_k, engine)):
            with pytest.raises(ValueError, match="whole distribution"):
                score(sequences, k)
    assert engine.score_top_k(sequences[:1], width - 1)[0].logprobs.shape[1] == width


def marks_are_checked(subject: Subject) -> None:
    with pytest.raises(ValueError, match="first token"):
        TokenSequence((1, 2), (True, False))
    with pytest.raises(ValueError, match="marks"):
        TokenSequence((1, 2), (True,))
    engine = subject.make()
    long = engine.max_length + 1
    sequence = TokenSequence(_ids(long, 0), (*[False] * (long - 1), True))
    with pytest.raises(ValueError, match=str(engine.max_length)):
        engine.score([sequence])
    with pytest.raises(ValueError, match=str(engine.max_length)):
        engine.forward_backward([TrainItem(sequence, {"weight": torch.ones(1)})], _weighted)


# -- training ---------------------------------------------------------------------------------------------------


def gradient_does_not_depend_on_micro_batches(subject: Subject) -> None:
    """SUM reduction: the same gradient, metrics and update, in one forward pass or in many, in any order."""
    seen = []
    for budget, backwards in ((10_000, False), (1, False), (40, True)):
        engine = subject.make(micro_batch_tokens=budget)
        batch = _batch()
        metrics = engine.forward_backward(batch[::-1] if backwards else batch, _weighted)
        # A gradient well above AdamW's epsilon and well below the clip, so that nothing hides a factor.
        report = engine.step(1e-3)
        seen.append((metrics["loss"], report.grad_norm, _view(engine)))
    (loss, norm, view), *others = seen
    for other_loss, other_norm, other_view in others:
        assert other_loss.total == pytest.approx(loss.total, rel=subject.relative, abs=subject.tolerance)
        assert other_loss.count == loss.count
        assert other_norm == pytest.approx(norm, rel=subject.relative)
        assert _gap(other_view, view) <= 20 * subject.tolerance


def gradients_accumulate(subject: Subject) -> None:
    """Two calls give the gradient of both batches together, and `step` forgets it."""
    both, parts = subject.make(), subject.make()
    batch = _batch()
    both.forward_backward(batch, _weighted)
    expected = both.step(1e-3).grad_norm
    for part in (batch[:2], batch[2:]):
        parts.forward_backward(part, _weighted)
    assert parts.step(1e-3).grad_norm == pytest.approx(expected, rel=subject.relative)
    assert parts.step(1e-3).grad_norm == 0


def candidates_coarse_grain_the_distribution(subject: Subject) -> None:
    """The loss sees the candidates and the rest, and its gradient is that of the same sums over the whole."""
    sequences = _sequences()
    k = 5
    teacher = subject.make()
    _train(teacher, 3)
    items = [
        TrainItem(s, {"candidates": top.ids, "q": top.logprobs})
        for s, top in zip(sequences, teacher.score_top_k(sequences, k), strict=True)
    ]
    seen: list[Tensor] = []

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, dict[str, Mean]]:
        seen.append(log_p.detach())
        loss = (log_p.exp() * (log_p - log_q)).sum()
        return loss, {"loss": Mean(loss.item(), len(log_p))}

    def coarse(logprobs: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Mean]]:
        assert logprobs.distribution is not None
        assert logprobs.distribution.shape == (len(logprobs.chosen), k + 1)
        return divergence(logprobs.distribution, signals["q"])

    def by_hand(logprobs: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Mean]]:
        assert logprobs.distribution is not None
        p, ids = logprobs.distribution.exp(), signals["ids"]
        others = torch.ones_like(p).scatter(1, ids, 0.0)
        return divergence(torch.cat([p.gather(1, ids), (p * others).sum(1, keepdim=True)], 1).log(), signals["q"])

    hidden = [TrainItem(i.sequence, {"ids": i.signals["candidates"], "q": i.signals["q"]}) for i in items]
    for budget in (10_000, 40):
        seen.clear()
        ours, theirs = subject.make(micro_batch_tokens=budget), subject.make(micro_batch_tokens=budget)
        loss = ours.forward_backward(items, coarse, distribution=True)["loss"].total
        expected = theirs.forward_backward(hidden, by_hand, distribution=True)["loss"].total
        half = len(seen) // 2
        assert _gap(torch.cat(seen[:half]), torch.cat(seen[half:])) <= subject.tolerance
        assert loss == pytest.approx(expected, rel=10 * subject.relative)
        assert expected > 0
        norms = [engine.step(1e-3).grad_norm for engine in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=subject.relative)
        assert norms[0] > 0
        assert _gap(_view(ours), _view(theirs)) <= 20 * subject.tolerance

    engine = subject.make()
    # Without `distribution` they are a signal like any other.
    engine.forward_backward(items, lambda p, signals: (p.chosen.sum() + signals["q"].sum(), {}))
    width = engine.score(sequences[:1], distribution=True)[0].shape[1]
    ids = items[0].signals["candidates"]
    wrong = [ids[1:], ids[:, 0], ids.float(), ids - width, ids + width, torch.arange(width).expand(len(ids), width)]
    for bad in wrong:
        with pytest.raises(ValueError, match="candidates"):
            engine.forward_backward([TrainItem(sequences[0], {"candidates": bad})], coarse, distribution=True)
    fewer = TrainItem(sequences[1], {"candidates": items[1].signals["candidates"][:, 1:]})
    for other in (fewer, TrainItem(sequences[1], {})):
        with pytest.raises(ValueError, match="candidates"):
            engine.forward_backward([items[0], other], coarse, distribution=True)


def training_moves_towards_the_loss(subject: Subject) -> None:
    engine = subject.make()
    sequences = _sequences()
    items = [TrainItem(s, {"weight": torch.full((s.marked,), 1 / 60)}) for s in sequences]
    before = torch.cat(engine.score(sequences)).mean()
    for _ in range(5):
        engine.forward_backward(items, _weighted)
        assert engine.step(1e-2).applied
    assert torch.cat(engine.score(sequences)).mean() > before + 0.01


def sampling_follows_the_update(subject: Subject) -> None:
    """No key or value computed with the old weights outlives `step`, not even in a session that goes on."""
    engine = subject.make()
    prompt = _ids(10, 0)
    first = _sample_all(engine, [SampleRequest(prompt, 5, seed=0, session="s")])[0]
    _train(engine, steps=3)
    tokens = (*prompt, *first.tokens, 41, 42)
    second = _sample_all(engine, [SampleRequest(tokens, 5, seed=1, session="s")])[0]
    whole = (*tokens, *second.tokens)
    mask = (False,) * len(tokens) + (True,) * len(second.tokens)
    assert _gap(engine.score([TokenSequence(whole, mask)])[0], torch.tensor(second.logprobs)) <= subject.tolerance


def what_is_not_finite_is_refused(subject: Subject) -> None:
    """And leaves no trace: training goes on as if that step had never been tried."""

    poisons: dict[str, Loss] = {
        "loss is nan": lambda x: x.sum() * math.nan,
        "loss is inf": lambda x: (x * 1e30).sum() * 1e30,
        # Infinite, with a gradient that is finite, as a clipped or detached term has.
        "loss is inf, gradient finite": lambda x: -x.mean() + x.detach().sum() * math.inf,
        # Finite, with a gradient that is not: d sqrt(x) at 0.
        "gradient is nan": lambda x: ((x - x.detach()) ** 2).sum().sqrt() * 0,
        "gradient is inf": lambda x: (x - x.detach()).abs().sqrt().sum(),
    }
    untouched, engine = subject.make(), subject.make()
    for one in (untouched, engine):
        _train(one)
    view = _view(engine)
    for name, poison in poisons.items():

        def loss(
            logprobs: TokenLogprobs, signals: Mapping[str, Tensor], poison: Loss = poison
        ) -> tuple[Tensor, dict[str, Mean]]:
            return poison(logprobs.chosen), {}

        # A good batch before and after it does not help.
        engine.forward_backward(_batch(), _weighted)
        engine.forward_backward(_batch(), loss)
        engine.forward_backward(_batch(), _weighted)
        report = engine.step(1e-2)
        assert not report.applied, name
        assert torch.equal(_view(engine), view), name
    # Neither the gradient nor the optimiser's moments or step count remember any of it.
    assert _train(engine, 2) == _train(untouched, 2)
    assert torch.equal(_view(engine), _view(untouched))


# -- the teacher ------------------------------------------------------------------------------------------------


def snapshot_teacher_stays(subject: Subject) -> None:
    engine = subject.make(teacher_follows=False)
    _train(engine)  # so that the teacher is not just the model as it was loaded
    engine.sync_teacher()
    before = _view(engine)
    assert torch.equal(_view(engine, "teacher"), before)
    _train(engine, 2)
    assert _gap(_view(engine), before) > 10 * subject.tolerance
    assert torch.equal(_view(engine, "teacher"), before)
    # The teacher can be sampled from, too, beside the student, and gives its own log-probs.
    prompt = _ids(10, 0)
    requests = [SampleRequest(prompt, 6, seed=0, weights=w, session="x") for w in ("student", "teacher")]
    for request, sample in zip(requests, _sample_all(engine, requests), strict=True):
        sequence = TokenSequence((*prompt, *sample.tokens), (False,) * len(prompt) + (True,) * len(sample.tokens))
        scored = engine.score([sequence], request.weights)[0]
        assert _gap(scored, torch.tensor(sample.logprobs)) <= subject.tolerance
    engine.sync_teacher()
    assert torch.equal(_view(engine, "teacher"), _view(engine))


def averaged_teacher_is_between(subject: Subject) -> None:
    """One sync at a small rate moves the teacher a little; many of them bring it to a student that stands still."""
    engine = subject.make(teacher_follows=False)
    for rate in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match="rate"):
            engine.sync_teacher(rate)
    old = _view(engine)
    engine.sync_teacher(0.3)  # of two that are equal
    assert _gap(_view(engine, "teacher"), old) <= subject.tolerance
    _train(engine, 2)
    new = _view(engine)
    apart = _gap(new, old)
    gaps = [_gap(_view(engine, "teacher"), new)]
    for _ in range(3):
        for _ in range(30):
            engine.sync_teacher(0.01)
        gaps.append(_gap(_view(engine, "teacher"), new))
    assert apart > gaps[0] / 2 > 0
    assert gaps == sorted(gaps, reverse=True)
    assert 0.2 < gaps[-1] / gaps[0] < 0.7  # 0.99^90 is 0.4
    for _ in range(12):
        engine.sync_teacher(0.5)
    assert _gap(_view(engine, "teacher"), new) <= subject.tolerance + apart / 1000
    assert torch.equal(_view(engine), new)  # the student is not touched
    _train(engine)
    engine.sync_teacher()
    assert torch.equal(_view(engine, "teacher"), _view(engine))


def following_teacher_is_never_stale(subject: Subject) -> None:
    engine = subject.make(teacher_follows=True)
    assert torch.equal(_view(engine, "teacher"), _view(engine))
    with pytest.raises(ValueError, match="rate"):
        engine.sync_teacher(0.5)  # it has nothing to average with
    _train(engine)
    with pytest.raises(StaleTeacherError):
        engine.score(_sequences(), "teacher")
    with pytest.raises(StaleTeacherError):
        _sample_all(engine, [SampleRequest(_ids(5, 0), 4, seed=0, weights="teacher")])
    engine.sync_teacher()
    assert torch.equal(_view(engine, "teacher"), _view(engine))
    engine.forward_backward(_batch(), _weighted)
    assert torch.equal(_view(engine, "teacher"), _view(engine))  # a gradient moves nothing yet
    assert _sample_all(engine, [SampleRequest(_ids(5, 0), 4, seed=0, weights="teacher")])


# -- saving -----------------------------------------------------------------------------------------------------


def saved_and_loaded_goes_on_bit_for_bit(subject: Subject, folder: Path) -> None:
    for teacher_follows, rate in ((True, 1.0), (False, 1.0), (False, 0.01)):
        here = folder / f"{teacher_follows} {rate}"
        here.mkdir()
        through = subject.make(teacher_follows=teacher_follows)
        _train(through, 2)
        through.sync_teacher(rate)
        _train(through, 1)
        through.save(here)
        resumed = subject.make(teacher_follows=teacher_follows)
        _train(resumed, 1, scale=-3.0)  # what `load` finds there must not matter
        resumed.forward_backward(_batch(scale=-3.0), _weighted)
        resumed.load(here)
        noise = torch.rand(3)
        resumed.load(here)
        assert torch.equal(torch.rand(3), noise)  # random numbers go on, too
        assert torch.equal(_view(resumed), _view(through))
        if teacher_follows:
            with pytest.raises(StaleTeacherError):
                _view(resumed, "teacher")
        else:
            assert torch.equal(_view(resumed, "teacher"), _view(through, "teacher"))
            assert _gap(_view(resumed, "teacher"), _view(resumed)) > 0
        assert _train(resumed, 3) == _train(through, 3)
        assert torch.equal(_view(resumed), _view(through))
        for _ in range(20):  # what an average has gathered below the weights' own resolution is there, too
            resumed.sync_teacher(rate)
            through.sync_teacher(rate)
        assert torch.equal(_view(resumed, "teacher"), _view(through, "teacher"))


CHECKS: list[Callable[[Subject], None]] = [
    seed_determines_the_sample,
    same_request_twice_at_once,
    sampled_logprobs_are_scored_logprobs,
    bad_requests_are_refused,
    score_reads_every_marked_position,
    order_and_micro_batches_do_not_matter_to_scores,
    top_k_is_the_head_of_the_distribution,
    marks_are_checked,
    gradient_does_not_depend_on_micro_batches,
    gradients_accumulate,
    candidates_coarse_grain_the_distribution,
    training_moves_towards_the_loss,
    sampling_follows_the_update,
    what_is_not_finite_is_refused,
    snapshot_teacher_stays,
    averaged_teacher_is_between,
    following_teacher_is_never_stale,
]
"""All but `saved_and_loaded_goes_on_bit_for_bit`, which needs a folder."""

OF_ARCHITECTURE: list[Callable[[Subject], None]] = [
    sampled_logprobs_are_scored_logprobs,
    score_reads_every_marked_position,
    gradient_does_not_depend_on_micro_batches,
    snapshot_teacher_stays,
]
"""Those that depend on how a model computes; the rest is the engine's own, whatever the model."""
