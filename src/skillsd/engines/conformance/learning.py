"""Checks of gradients, steps, the teacher and checkpoints."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from skillsd.engines.base import SampleRequest, StaleTeacherError, TrainItem
from skillsd.engines.conformance.kit import (
    WEIGHTED,
    Subject,
    chosen,
    distribution_of,
    equal,
    expect,
    gap,
    loss_of,
    near,
    norm_of,
    refuses,
    require,
    sample_all,
)
from skillsd.metrics import Mean, Metrics, PerToken
from skillsd.objective.logprobs import CHOSEN, WHOLE, TokenLogprobs, Want, top_k
from skillsd.objective.loss import TOKEN_NUMBER, per_token


async def gradient_does_not_depend_on_micro_batches(subject: Subject) -> None:
    """The same gradient, metrics and update, in one forward pass or in many, in any order."""
    seen = []
    for budget, backwards in ((10_000, False), (1, False), (40, True)):
        engine = subject.make(micro_batch_tokens=budget)
        batch = subject.batch()
        metrics = await engine.learner.forward_backward(batch[::-1] if backwards else batch, WEIGHTED)
        # A gradient well above AdamW's epsilon and well below the clip, so that no factor is hidden.
        report = await engine.learner.step(1e-3)
        seen.append((loss_of(metrics), norm_of(report), await subject.view(engine)))
        engine.close()
    (loss, norm, view), *others = seen
    for other_loss, other_norm, other_view in others:
        near(other_loss.total, loss.total, subject.relative, "the summed loss", subject.tolerance)
        equal(other_loss.count, loss.count, "the number of tokens in the metric")
        near(other_norm, norm, subject.relative, "the gradient's norm")
        expect(gap(other_view, view) <= 20 * subject.tolerance, "the update depends on how the batch is cut")


@dataclass(frozen=True)
class LossByToken:
    """A loss with a metric by token, as the records of a run need it."""

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        return student.chosen.sum(), {"by_token": per_token(signals[TOKEN_NUMBER], student.chosen)}


async def metrics_by_token_come_back_whole(subject: Subject) -> None:
    """A metric by token has the value of every token, in one forward pass or in many."""
    sequences = subject.sequences()
    counts = [sequence.marked for sequence in sequences]
    numbers = torch.arange(sum(counts)).split(counts)
    items = [TrainItem(s, {TOKEN_NUMBER: number}) for s, number in zip(sequences, numbers, strict=True)]
    for budget, backwards in ((10_000, False), (40, True)):
        engine = subject.make(micro_batch_tokens=budget)
        expected = torch.cat(await chosen(engine.learner, sequences))
        metrics = await engine.learner.forward_backward(items[::-1] if backwards else items, LossByToken())
        found = metrics.get("by_token")
        if not isinstance(found, PerToken):
            raise AssertionError(f"the metric by token came back as {type(found).__name__}, expected a PerToken")
        order = torch.tensor(found.tokens).argsort()
        equal(torch.tensor(found.tokens)[order], torch.arange(sum(counts)), "the numbers of the tokens in the metric")
        difference = gap(torch.tensor(found.values)[order], expected)
        expect(difference <= subject.tolerance, f"log-probs in a metric by token differ by up to {difference:.3g}")
        engine.close()


async def gradients_accumulate(subject: Subject) -> None:
    """Two calls give the gradient of both batches together, and `step` forgets it."""
    both, parts, batch = subject.make(), subject.make(), subject.batch()
    await both.learner.forward_backward(batch, WEIGHTED)
    expected = norm_of(await both.learner.step(1e-3))
    for part in (batch[:2], batch[2:]):
        await parts.learner.forward_backward(part, WEIGHTED)
    near(norm_of(await parts.learner.step(1e-3)), expected, subject.relative, "the norm of two accumulated gradients")
    equal(norm_of(await parts.learner.step(1e-3)), 0.0, "the norm after a step")
    both.close()
    parts.close()


async def training_moves_towards_the_loss(subject: Subject) -> None:
    """A few steps make the trained tokens more likely, and raise the version."""
    engine = subject.make()
    sequences = subject.sequences()
    items = [TrainItem(s, {"weight": torch.full((s.marked,), 1 / 60)}) for s in sequences]
    before = torch.cat(await chosen(engine.learner, sequences)).mean()
    version = engine.learner.version
    for number in range(5):
        await engine.learner.forward_backward(items, WEIGHTED)
        report = await engine.learner.step(1e-2)
        expect(report.applied, "an ordinary step is applied")
        equal(report.version, version + number + 1, "the version after a step")
    after = torch.cat(await chosen(engine.learner, sequences)).mean()
    expect(bool(after > before + 0.01), f"training did not make the tokens more likely ({before:.4f} to {after:.4f})")
    engine.close()


async def candidates_coarse_grain_the_distribution(subject: Subject) -> None:
    """The loss sees the candidates and the rest, and its gradient is that of the same sums over the whole."""
    teacher = subject.make()
    require(teacher, "distribution")
    sequences, k = subject.sequences(), 5
    await subject.train(teacher, 3)
    tops = await teacher.learner.logprobs(sequences, want=top_k(k))
    items = [
        TrainItem(s, {"candidates": _ids(top), "q": distribution_of(top)})
        for s, top in zip(sequences, tops, strict=True)
    ]
    hidden = [TrainItem(i.sequence, {"ids": i.signals["candidates"], "q": i.signals["q"]}) for i in items]
    for budget in (10_000, 40):
        ours, theirs = subject.make(micro_batch_tokens=budget), subject.make(micro_batch_tokens=budget)
        loss = loss_of(await ours.learner.forward_backward(items, _Divergence(top_k(k)))).total
        expected = loss_of(await theirs.learner.forward_backward(hidden, _Divergence(WHOLE))).total
        near(loss, expected, 10 * subject.relative, "a divergence over candidates")
        expect(expected > 0, "the divergence between two policies is positive")
        norms = [norm_of(await engine.learner.step(1e-3)) for engine in (ours, theirs)]
        near(norms[0], norms[1], subject.relative, "the norm of its gradient")
        expect(gap(await subject.view(ours), await subject.view(theirs)) <= 20 * subject.tolerance, "its update")
        ours.close()
        theirs.close()
    engine = subject.make()
    # A loss that wants only the chosen tokens gets candidates like any other signal.
    await engine.learner.forward_backward(items, _SignalsOnly())
    width = distribution_of((await engine.learner.logprobs(sequences[:1], want=WHOLE))[0]).shape[1]
    ids = items[0].signals["candidates"]
    wrong = [ids[1:], ids[:, 0], ids.float(), ids - width, ids + width, torch.arange(width).expand(len(ids), width)]
    fewer = TrainItem(sequences[1], {"candidates": items[1].signals["candidates"][:, 1:]})
    batches = [[TrainItem(sequences[0], {"candidates": bad})] for bad in wrong]
    batches += [[items[0], other] for other in (fewer, TrainItem(sequences[1], {}))]
    for batch in batches:
        call = engine.learner.forward_backward(batch, _Divergence(top_k(k)))
        await refuses(call, ValueError, "candidates", "bad candidates")
    engine.close()
    teacher.close()


@dataclass(frozen=True)
class _Divergence:
    """Reverse KL over k candidates and the rest: given by the engine, or made here of the whole distribution."""

    want: Want = CHOSEN

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        log_p = distribution_of(student)
        if self.want == WHOLE:
            p, ids = log_p.exp(), signals["ids"]
            others = torch.ones_like(p).scatter(1, ids, 0.0)
            log_p = torch.cat([p.gather(1, ids), (p * others).sum(1, keepdim=True)], 1).log()
        loss = (log_p.exp() * (log_p - signals["q"])).sum()
        return loss, {"loss": Mean(loss.item(), len(log_p))}


@dataclass(frozen=True)
class _SignalsOnly:
    """A loss that wants the chosen tokens' log-probs, of items with candidates."""

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        return student.chosen.sum() + signals["q"].sum(), {}


def _ids(top: TokenLogprobs) -> Tensor:
    if top.candidates is None:
        raise AssertionError("top-k log-probs come with candidates")
    return top.candidates


POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "loss is nan": lambda x: x.sum() * math.nan,
    "loss is inf": lambda x: (x * 1e30).sum() * 1e30,
    # Infinite, with a finite gradient, as a clipped or detached term has.
    "loss is inf, gradient finite": lambda x: -x.mean() + x.detach().sum() * math.inf,
    # Finite, with a gradient that is not: d sqrt(x) at 0.
    "gradient is nan": lambda x: ((x - x.detach()) ** 2).sum().sqrt() * 0,
    "gradient is inf": lambda x: (x - x.detach()).abs().sqrt().sum(),
}


@dataclass(frozen=True)
class _Poisoned:
    """One of the `POISONS` as a loss."""

    name: str

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        return POISONS[self.name](student.chosen), {}


async def what_is_not_finite_is_refused(subject: Subject) -> None:
    """Training goes on as if that step had never been attempted."""
    untouched, engine = subject.make(), subject.make()
    require(engine, "refuses_non_finite")
    for one in (untouched, engine):
        await subject.train(one)
    view = await subject.view(engine)
    for name in POISONS:
        # A good batch before and after it does not help.
        await engine.learner.forward_backward(subject.batch(), WEIGHTED)
        await engine.learner.forward_backward(subject.batch(), _Poisoned(name))
        await engine.learner.forward_backward(subject.batch(), WEIGHTED)
        report = await engine.learner.step(1e-2)
        expect(not report.applied, f"{name}: the step was applied")
        equal(report.version, engine.learner.version, f"{name}: the version after a refused step")
        equal(await subject.view(engine), view, f"{name}: the weights after a refused step")
    # Neither the gradient nor the optimiser's moments or step count remember any of it.
    equal(await subject.train(engine, 2), await subject.train(untouched, 2), "training after refused steps")
    equal(await subject.view(engine), await subject.view(untouched), "weights after refused steps")
    engine.close()
    untouched.close()


# -- the teacher ------------------------------------------------------------------------------------------------


async def snapshot_teacher_stays(subject: Subject) -> None:
    """A teacher with weights of its own changes by `sync_teacher` alone."""
    engine = subject.make(snapshot_teacher=True)
    require(engine, "teacher_snapshot")
    await subject.train(engine)  # so that the teacher is not just the model as it was loaded
    await engine.learner.sync_teacher()
    before = await subject.view(engine)
    equal(await subject.view(engine, "teacher"), before, "the teacher after a sync")
    await subject.train(engine, 2)
    expect(gap(await subject.view(engine), before) > 10 * subject.tolerance, "training moves the student")
    equal(await subject.view(engine, "teacher"), before, "the teacher after the student's updates")
    await engine.learner.sync_teacher()
    equal(await subject.view(engine, "teacher"), await subject.view(engine), "the teacher after another sync")
    engine.close()


async def averaged_teacher_is_between(subject: Subject) -> None:
    """A sync at a small rate moves the teacher a little; many of them bring it to a student that stands still."""
    engine = subject.make(snapshot_teacher=True)
    require(engine, "teacher_average")
    learner = engine.learner
    for rate in (0.0, -0.5, 1.5, math.nan):
        await refuses(learner.sync_teacher(rate), ValueError, "rate", f"a rate of {rate}")
    old = await subject.view(engine)
    await learner.sync_teacher(0.3)  # of two that are equal
    subject.close_views(await subject.view(engine, "teacher"), old, "an average of equal weights")
    await subject.train(engine, 2)
    new = await subject.view(engine)
    apart = gap(new, old)
    gaps = [gap(await subject.view(engine, "teacher"), new)]
    for _ in range(3):
        for _ in range(30):
            await learner.sync_teacher(0.01)
        gaps.append(gap(await subject.view(engine, "teacher"), new))
    expect(apart > gaps[0] / 2 > 0, "the teacher lags behind the student")
    expect(gaps == sorted(gaps, reverse=True), f"every sync brings the teacher closer: {gaps}")
    expect(0.2 < gaps[-1] / gaps[0] < 0.7, f"90 syncs at .01 keep about 40 % of the distance: {gaps}")  # 0.99^90
    for _ in range(12):
        await learner.sync_teacher(0.5)
    left = gap(await subject.view(engine, "teacher"), new)
    expect(
        left <= subject.tolerance + apart / 1000, f"after many syncs the teacher is still {left:.3g} off the student"
    )
    equal(await subject.view(engine), new, "the student after syncs of the teacher")
    await subject.train(engine)
    await learner.sync_teacher()
    equal(await subject.view(engine, "teacher"), await subject.view(engine), "the teacher after a whole sync")
    engine.close()


async def following_teacher_is_never_stale(subject: Subject) -> None:
    """A teacher that follows the student is the student as of the last sync, or an error."""
    engine = subject.make()
    learner = engine.learner
    before = await subject.view(engine)
    equal(await subject.view(engine, "teacher"), before, "the teacher before any update")
    await subject.train(engine)
    try:
        view = await subject.view(engine, "teacher")
    except StaleTeacherError:
        if engine.capabilities.teacher_sampling:
            request = SampleRequest(subject.ids(5, 0), 4, seed=0, weights="teacher")
            await refuses(sample_all(engine, [request]), StaleTeacherError, "teacher", "sampling from a stale teacher")
    else:
        equal(view, before, "the teacher after an update without a sync")
    await learner.sync_teacher()
    equal(await subject.view(engine, "teacher"), await subject.view(engine), "the teacher after a sync")
    await learner.forward_backward(subject.batch(), WEIGHTED)
    equal(await subject.view(engine, "teacher"), await subject.view(engine), "the teacher after a gradient, no step")
    engine.close()


# -- checkpoints ------------------------------------------------------------------------------------------------


async def restored_state_goes_on_bit_for_bit(subject: Subject) -> None:
    """Weights, optimiser, teacher and version are what they were; further training gives the same bits."""
    engine = subject.make()
    require(engine, "exact_resume")
    able = engine.capabilities
    engine.close()
    cases = [(False, 1.0)]
    cases += [(True, 1.0)] * able.teacher_snapshot + [(True, 0.01)] * (able.teacher_snapshot and able.teacher_average)
    for snapshot, rate in cases:
        with tempfile.TemporaryDirectory(prefix="skillsd-conformance-") as name:
            folder = Path(name)
            through = subject.make(snapshot_teacher=snapshot)
            await subject.train(through, 2)
            await through.learner.sync_teacher(rate)
            await subject.train(through, 1)
            await through.learner.save_state(folder)
            resumed = subject.make(snapshot_teacher=snapshot)
            await subject.train(resumed, 1, scale=-3.0)  # what was there before must not matter
            await resumed.learner.forward_backward(subject.batch(scale=-3.0), WEIGHTED)
            await resumed.load_state(folder)
        equal(resumed.learner.version, through.learner.version, "the version after a restore")
        equal(await subject.view(resumed), await subject.view(through), "the student after a restore")
        if snapshot:
            equal(
                await subject.view(resumed, "teacher"),
                await subject.view(through, "teacher"),
                "the teacher after a restore",
            )
        equal(await subject.train(resumed, 3), await subject.train(through, 3), "training after a restore")
        equal(await subject.view(resumed), await subject.view(through), "the student after more training")
        if snapshot:
            for _ in range(20):  # what an average has gathered below the weights' own resolution is restored, too
                await resumed.learner.sync_teacher(rate)
                await through.learner.sync_teacher(rate)
            equal(
                await subject.view(resumed, "teacher"),
                await subject.view(through, "teacher"),
                "the teacher after more syncs",
            )
        resumed.close()
        through.close()
