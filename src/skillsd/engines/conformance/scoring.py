"""Checks of the learner's log-probs."""

from __future__ import annotations

import torch

from skillsd.engines.base import TokenSequence, TrainItem
from skillsd.engines.conformance.kit import (
    WEIGHTED,
    SkippedCheck,
    Subject,
    chosen,
    distribution_of,
    equal,
    expect,
    gap,
    refuses,
    require,
)
from skillsd.objective.logprobs import WHOLE, top_k


async def logprobs_are_the_models(subject: Subject) -> None:
    """At every marked place, equal to a plain forward pass of the same model."""
    engine = subject.make()
    if subject.reference is None:
        engine.close()
        raise SkippedCheck("no reference to compare with")
    temperature = 0.5 if engine.capabilities.temperature else 1.0
    for sequence, one in zip(
        subject.sequences(),
        await engine.learner.logprobs(subject.sequences(), temperature=temperature),
        strict=True,
    ):
        places = [place for place, marked in enumerate(sequence.mask) if marked]
        plain = (subject.reference(sequence.tokens)[[place - 1 for place in places]] / temperature).log_softmax(-1)
        tokens = torch.tensor([[sequence.tokens[place]] for place in places])
        equal(one.chosen.shape, torch.Size([len(places)]), "shape of the chosen log-probs")
        equal(one.chosen.dtype, torch.float32, "dtype of log-probs")
        equal(one.chosen.device.type, "cpu", "device of log-probs")
        off = gap(one.chosen, plain.gather(1, tokens)[:, 0])
        expect(off <= 2 * subject.tolerance, f"log-probs differ from the model's by up to {off:.3g}")
    engine.close()


async def distribution_is_the_models(subject: Subject) -> None:
    """The whole vocabulary's log-probs are the model's, and agree with those of the chosen tokens."""
    engine = subject.make()
    require(engine, "distribution")
    sequences = subject.sequences()
    some = await chosen(engine.learner, sequences)
    for sequence, one, only in zip(sequences, await engine.learner.logprobs(sequences, want=WHOLE), some, strict=True):
        whole = distribution_of(one)
        places = [place for place, marked in enumerate(sequence.mask) if marked]
        tokens = torch.tensor([[sequence.tokens[place]] for place in places])
        equal(one.chosen, whole.gather(1, tokens)[:, 0], "chosen log-probs and those in the distribution")
        off = gap(only, one.chosen)  # an engine may compute the chosen tokens' alone by another kernel
        expect(
            off <= subject.tolerance, f"chosen log-probs, wanted alone or with the distribution, differ by {off:.3g}"
        )
        expect(whole.dtype == torch.float32 and whole.device.type == "cpu", "distributions are float32 on the CPU")
        if subject.reference is not None:
            plain = subject.reference(sequence.tokens)[[place - 1 for place in places]].log_softmax(-1)
            off = gap(whole, plain)
            expect(off <= 2 * subject.tolerance, f"the distribution differs from the model's by up to {off:.3g}")
    engine.close()


async def order_and_micro_batches_do_not_matter(subject: Subject) -> None:
    """Scores don't depend on what is scored together; a sequence without marks has none."""
    sequences = subject.sequences()
    sequences.insert(2, TokenSequence(subject.ids(4, 99), (False,) * 4))
    engine = subject.make()
    expected = await chosen(engine.learner, sequences)
    equal(expected[2].numel(), 0, "log-probs of a sequence without marks")
    equal(await engine.learner.logprobs([]), [], "log-probs of no sequences")
    engine.close()
    for budget in (1, 40, 10_000):
        engine = subject.make(micro_batch_tokens=budget)
        backwards = (await chosen(engine.learner, sequences[::-1]))[::-1]
        for ours, theirs in zip(backwards, expected, strict=True):
            equal(ours.shape, theirs.shape, "shape of log-probs")
            same = ours.numel() == 0 or gap(ours, theirs) <= subject.tolerance
            expect(same, f"log-probs depend on micro_batch_tokens={budget} or the order")
        engine.close()


async def top_k_is_the_head_of_the_distribution(subject: Subject) -> None:
    """The k most likely tokens, and the total of the others."""
    engine = subject.make(micro_batch_tokens=40)
    require(engine, "distribution")
    learner, sequences = engine.learner, subject.sequences()
    sequences.insert(2, TokenSequence(subject.ids(4, 99), (False,) * 4))
    full = await learner.logprobs(sequences, want=WHOLE)
    width = distribution_of(full[0]).shape[1]
    for k in (1, 7):
        for sequence, top, whole in zip(sequences, await learner.logprobs(sequences, want=top_k(k)), full, strict=True):
            coarse, ids = distribution_of(top), top.candidates
            if ids is None:
                raise AssertionError("top-k log-probs come with candidates")
            equal(ids.dtype, torch.int64, "dtype of candidates")
            equal(tuple(ids.shape), (sequence.marked, k), "shape of candidates")
            equal(tuple(coarse.shape), (sequence.marked, k + 1), "shape of top-k log-probs")
            if not sequence.marked:
                continue
            distribution = distribution_of(whole)
            best = distribution.sort(dim=1, descending=True).values
            room = 2 * subject.tolerance
            expect(gap(top.chosen, whole.chosen) <= room, "chosen log-probs beside the top k")
            # By value, not by id: two tokens that are nearly as likely may change places.
            expect(gap(coarse[:, :k], best[:, :k]) <= room, "log-probs of the k most likely tokens")
            expect(gap(coarse[:, k], best[:, k:].logsumexp(1)) <= room, "log-prob of all other tokens together")
            expect(gap(coarse[:, :k], distribution.gather(1, ids)) <= room, "candidates belong to their log-probs")
            expect(all(len(set(row)) == k for row in ids.tolist()), "candidates are distinct")
    for k in (0, width, width + 1):
        await refuses(learner.logprobs(sequences, want=top_k(k)), ValueError, "whole distribution", f"k={k}")
    [largest] = await learner.logprobs(sequences[:1], want=top_k(width - 1))
    equal(distribution_of(largest).shape[1], width, "width of the largest k")
    engine.close()


async def long_sequences_are_refused(subject: Subject) -> None:
    """Never cut."""
    engine = subject.make()
    long = engine.max_length + 1
    if long > 1 << 20:
        engine.close()
        raise SkippedCheck(f"the model takes {engine.max_length} tokens: too many to exceed in a check")
    sequence = TokenSequence(subject.ids(long, 0), (*[False] * (long - 1), True))
    words = str(engine.max_length)
    await refuses(engine.learner.logprobs([sequence]), ValueError, words, "scoring a sequence that is too long")
    item = TrainItem(sequence, {"weight": torch.ones(1)})
    await refuses(
        engine.learner.forward_backward([item], WEIGHTED), ValueError, words, "training on a sequence that is too long"
    )
    engine.close()
