"""Checks of the sampler."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import torch

from skillsd.engines.base import SampleRequest, TokenSequence
from skillsd.engines.conformance.kit import (
    WEIGHTED,
    Subject,
    chosen,
    equal,
    expect,
    gap,
    near,
    refuses,
    require,
    sample_all,
)


async def seed_determines_the_sample(subject: Subject) -> None:
    """The same request gives the same sample, whatever else is decoded at the same time."""
    engine = subject.make()
    await engine.publish()
    temperatures = [0.7 + n / 10 if engine.capabilities.temperature else 1.0 for n in range(6)]
    requests = [
        SampleRequest(subject.ids(5 + 9 * n, n % 3), 12, seed=n, temperature=t) for n, t in enumerate(temperatures)
    ]
    alone = [(await sample_all(engine, [request]))[0] for request in requests]
    equal([(await sample_all(engine, [request]))[0] for request in requests], alone, "the same requests again")
    others = await sample_all(engine, [replace(request, seed=request.seed + 100) for request in requests])
    expect(all(a.tokens != b.tokens for a, b in zip(alone, others, strict=True)), "another seed samples other tokens")
    if subject.batch_invariant:
        for company in (requests, requests[::-1]):
            for request, sample in zip(company, await sample_all(engine, company), strict=True):
                expected = alone[request.seed]
                equal(sample.tokens, expected.tokens, "tokens in other company")
                equal(sample.stop_reason, expected.stop_reason, "stop reason in other company")
                for found, logprob in zip(sample.logprobs, expected.logprobs, strict=True):
                    near(found, logprob, 0, "log-probs in other company", subject.tolerance)
    engine.close()


async def same_request_twice_at_once(subject: Subject) -> None:
    """Two equal requests at once don't disturb each other."""
    engine = subject.make()
    await engine.publish()
    request = SampleRequest(subject.ids(9, 1), 6, seed=3)
    one, other = await sample_all(engine, [request, request])
    if subject.batch_invariant:
        equal(other.tokens, one.tokens, "the same request at the same time")
    engine.close()


async def sampled_logprobs_are_scored_logprobs(subject: Subject) -> None:
    """Over several turns of a session, at several temperatures, together with other sessions."""
    engine = subject.make()
    await engine.publish()

    async def episode(number: int, temperature: float) -> tuple[TokenSequence, list[float]]:
        prompt = subject.ids(8 + 5 * number, 0)
        tokens, mask, logprobs = list(prompt), [False] * len(prompt), list[float]()
        for turn in range(3):
            request = SampleRequest(
                tuple(tokens), 9, seed=number * 10 + turn, temperature=temperature, session=str(number)
            )
            sample = await engine.sampler.sample(request)
            observation = subject.ids(3 + 4 * number, turn)
            tokens += [*sample.tokens, *observation]
            mask += [True] * len(sample.tokens) + [False] * len(observation)
            logprobs += sample.logprobs
        engine.sampler.end_session(str(number))
        return TokenSequence(tuple(tokens), tuple(mask)), logprobs

    for temperature in (1.0, 0.2) if engine.capabilities.temperature else (1.0,):
        episodes = await asyncio.gather(*(episode(number, temperature) for number in range(4)))
        scored = await chosen(engine.learner, [sequence for sequence, _ in episodes], temperature=temperature)
        for (_, logprobs), score in zip(episodes, scored, strict=True):
            # Rounding in a logit counts 1 / temperature times.
            off = gap(torch.tensor(logprobs), score)
            expect(off <= subject.tolerance / min(1.0, temperature), f"sampled log-probs are off by {off:.3g}")
    engine.close()


async def bad_requests_are_refused(subject: Subject) -> None:
    """And harm neither their session nor others."""
    engine = subject.make()
    await engine.publish()
    sampler, prompt = engine.sampler, subject.ids(6, 0)
    longest = SampleRequest(prompt, sampler.max_length - 5, seed=0)
    await refuses(sampler.sample(SampleRequest((), 4, seed=0)), ValueError, "at least one token", "no tokens")
    await refuses(sampler.sample(SampleRequest(prompt, 0, seed=0)), ValueError, "at least one token", "no room")
    await refuses(sampler.sample(longest), ValueError, str(sampler.max_length), "a sequence that is too long")
    first = await sampler.sample(SampleRequest(prompt, 4, seed=0, session="a"))
    held = (*prompt, *first.tokens)
    other = (subject.tokens[0] + subject.tokens[1] - prompt[0], *held[1:], subject.tokens[10])
    await refuses(
        sampler.sample(SampleRequest(other, 4, seed=1, session="a")), ValueError, "extend", "another beginning"
    )
    await refuses(sampler.sample(SampleRequest(prompt, 4, seed=1, session="a")), ValueError, "extend", "a shorter one")
    longer = (*held, subject.tokens[10])
    again = await sampler.sample(SampleRequest(longer, 4, seed=1, session="a"))
    fresh = await sampler.sample(SampleRequest(longer, 4, seed=1))
    if subject.batch_invariant:
        equal(again.tokens, fresh.tokens, "a session after refused requests")
    sampler.end_session("a")
    sampler.end_session("an unknown session")
    await sampler.sample(SampleRequest(prompt, 4, seed=0, session="a"))  # the name is free again
    engine.close()


async def sampling_follows_the_published_weights(subject: Subject) -> None:
    """No key or value computed with old weights is used after an update, not even in a session that goes on."""
    engine = subject.make()
    await engine.publish()
    prompt = subject.ids(10, 0)
    first = await engine.sampler.sample(SampleRequest(prompt, 5, seed=0, session="s"))
    equal(first.version, engine.learner.version, "the version of a sample")
    await subject.train(engine, steps=3)
    tokens = (*prompt, *first.tokens, *subject.ids(2, 9))
    second = await engine.sampler.sample(SampleRequest(tokens, 5, seed=1, session="s"))
    equal(second.version, engine.learner.version, "the version of a sample after updates")
    expect(second.version > first.version, "updates raise the version")
    mask = (False,) * len(tokens) + (True,) * len(second.tokens)
    [scored] = await chosen(engine.learner, [TokenSequence((*tokens, *second.tokens), mask)])
    off = gap(scored, torch.tensor(second.logprobs))
    expect(off <= subject.tolerance, f"log-probs sampled after an update are off by {off:.3g}")
    engine.close()


async def published_weights_sample_while_others_are_trained(subject: Subject) -> None:
    """Sampling goes on with the weights that were published last, while the learner trains and after its steps."""
    engine = subject.make()
    require(engine, "concurrent")
    await engine.publish()
    requests = [SampleRequest(subject.ids(8 + n, n), 6, seed=n, session=str(n)) for n in range(4)]
    before = await sample_all(engine, requests)
    for request in requests:
        engine.sampler.end_session(str(request.session))

    async def steps() -> None:
        for _ in range(3):
            await engine.learner.forward_backward(subject.batch(), WEIGHTED)
            await engine.learner.step(0.05)

    training = asyncio.create_task(steps())
    meanwhile = await sample_all(engine, requests[:2])
    await training
    afterwards = await sample_all(engine, requests[2:])
    for sample, expected in zip([*meanwhile, *afterwards], before, strict=True):
        equal(sample.version, expected.version, "the version of a sample")
        off = gap(torch.tensor(sample.logprobs), torch.tensor(expected.logprobs))
        expect(sample.tokens == expected.tokens and off <= subject.tolerance, "samples of the published weights")
    await engine.publish()
    [after] = await sample_all(engine, [replace(requests[0], session=None)])
    equal(after.version, engine.learner.version, "the version of a sample once the new weights are published")
    engine.close()


async def teacher_is_sampled(subject: Subject) -> None:
    """Beside the student, with its own log-probs."""
    engine = subject.make(snapshot_teacher=True)
    require(engine, "teacher_sampling", "teacher_snapshot")
    await subject.train(engine, 2)
    prompt = subject.ids(10, 0)
    for weights in ("student", "teacher"):
        request = SampleRequest(prompt, 6, seed=0, weights=weights, session="x")
        [sample] = await sample_all(engine, [request])
        mask = (False,) * len(prompt) + (True,) * len(sample.tokens)
        [scored] = await chosen(engine.learner, [TokenSequence((*prompt, *sample.tokens), mask)], weights=weights)
        off = gap(scored, torch.tensor(sample.logprobs))
        expect(off <= subject.tolerance, f"log-probs sampled from the {weights} are off by {off:.3g}")
    engine.close()
