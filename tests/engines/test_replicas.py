"""Several samplers as one. The samplers here are embedded engines that load published folders, with injected faults."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.tiny import DATA, embedded, sample_all, tokenizer, torch_engine, train
from skillsd.engines import replicas
from skillsd.engines.base import Engine, Sample, Sampler, SampleRequest, WeightsHandle
from skillsd.engines.options import EngineSpec
from skillsd.engines.replicas import COMPARED_TOKENS, MAX_STARTS, Replicas
from skillsd.engines.vllm.options import VllmOptions
from skillsd.engines.weights_folder import weights_folder
from skillsd.errors import EngineFailedError, SamplerLostError, UserError

TIMEOUT = 0.3
"""After which a sampler's request is given up, in seconds."""


_ONE_AT_A_TIME = threading.Lock()
"""transformers loads one model at a time, and replicas load theirs in threads."""


class Double(Sampler):
    """An embedded engine in the place of another process.

    Attributes:
        fault: called with the number of each request, from 1; raises or waits.
        stale: whether it keeps its first weights, as if later ones never arrived.
        in_memory: whether it takes weights from the learner's memory after the first ones.
    """

    def __init__(self, made: list[Double], learner: Any, folder: Path) -> None:
        self.number, self.learner = len(made), learner
        self.inbox = self.folder = folder / f"inbox-{self.number}"
        self.folder.mkdir()
        tokenizer().save_pretrained(self.folder)  # which published weights come without
        self.max_length = learner.max_length
        self.engine: Engine | None = None
        self.requests: list[SampleRequest] = []
        self.fault: Callable[[int], Any] = lambda number: None
        self.stale = self.in_memory = self.closed = False
        self.failing_loads = 0
        made.append(self)

    async def load(self, weights: WeightsHandle) -> None:
        self.version = weights.version
        if self.failing_loads:
            self.failing_loads -= 1
            raise SamplerLostError("the process was killed while it loaded")
        if self.inbox is None:
            assert weights.location is None
            self.engine = Engine(self.learner, self.learner, "torch", None)  # type: ignore[arg-type]
            return
        assert weights.location == str(self.inbox)
        if self.engine is None or not self.stale:
            with _ONE_AT_A_TIME:
                self.engine = embedded(self.inbox)
        if self.in_memory:
            self.inbox = None

    async def sample(self, request: SampleRequest) -> Sample:
        assert self.engine is not None
        self.requests.append(request)
        await asyncio.sleep(0)
        if self.closed:
            raise SamplerLostError("closed")
        try:
            await asyncio.wait_for(self._fault(), TIMEOUT)
        except TimeoutError:
            raise SamplerLostError("no answer") from None
        found = await torch_engine(self.engine).sample(request)
        return Sample(found.tokens, found.logprobs, found.stop_reason, self.version)

    async def _fault(self) -> None:
        if (waiting := self.fault(len(self.requests))) is not None:
            await waiting

    def end_session(self, session: str) -> None:
        assert self.engine is not None
        torch_engine(self.engine).end_session(session)

    def close(self) -> None:
        self.closed = True
        shutil.rmtree(self.folder, ignore_errors=True)

    def metrics(self) -> dict[str, float]:
        return {"rollout/cached_prompt_tokens": float(self.number)}


class Group:
    """An engine over doubles, and all doubles that were made, replacements last."""

    def __init__(self, model: Path, folder: Path, count: int, tolerance: float = 1e-3, ahead: bool = False) -> None:
        self.made: list[Double] = []
        self.prepare: Callable[[Double], None] = lambda double: None
        self.learner = torch_engine(embedded(model))
        self.folder = folder
        self.replicas = Replicas(self.make, count, self.learner, tolerance=tolerance, ahead=ahead)
        self.engine = Engine(self.learner, self.replicas, "doubles", None)  # type: ignore[arg-type]

    def make(self, number: int) -> Double:
        double = Double(self.made, self.learner, self.folder)
        self.prepare(double)
        return double

    def serving(self, number: int) -> Double:
        """The sampler that is replica `number` now."""
        found = self.replicas._replicas[number].sampler
        assert isinstance(found, Double)
        return found


@pytest.fixture
def group(tied_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Group]]:
    made: list[Group] = []

    def make(count: int, **options: Any) -> Group:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Group(tied_folder, folder, count, **options))
        asyncio.run(made[-1].engine.publish())
        return made[-1]

    yield make
    for one in made:
        one.replicas.close()
        one.replicas.close()
        assert all(double.closed for double in one.made)
        assert not one.replicas.folder.exists()


async def episodes(
    sampler: Sampler, count: int = 12, turns: int = 4, temperature: float = 1.0
) -> list[tuple[int, ...]]:
    """Episodes of several turns at once; returns their tokens."""

    async def episode(number: int) -> tuple[int, ...]:
        tokens = tuple(DATA.ids(5 + number, number))
        for turn in range(turns):
            request = SampleRequest(tokens, 4, 100 * number + turn, session=str(number))
            tokens = (*tokens, *(await sampler.sample(request)).tokens, 40 + turn)
        sampler.end_session(str(number))
        return tokens

    return await asyncio.gather(*(episode(number) for number in range(count)))


@pytest.fixture(scope="module")
def expected(tied_folder: Path) -> list[tuple[int, ...]]:
    return asyncio.run(episodes(torch_engine(embedded(tied_folder))))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_samples_do_not_depend_on_the_number_of_replicas(
    group: Callable[..., Group], expected: list[tuple[int, ...]], count: int
) -> None:
    doubles = group(count)
    assert asyncio.run(episodes(doubles.replicas)) == expected
    served = [[int(request.session or "") for request in double.requests] for double in doubles.made]
    assert [len(set(sessions)) for sessions in served] == [12 // count] * count, "equal parts"
    assert sum(map(len, served)) == 48
    assert not set.intersection(*map(set, served)) or count == 1, "a session stays with its replica"
    assert not any(replica.sessions for replica in doubles.replicas._replicas)
    assert all(replica.compared for replica in doubles.replicas._replicas)
    metrics = doubles.replicas.metrics()
    assert (metrics["rollout/sampler_restarts"], metrics["rollout/moved_requests"]) == (0, 0)
    if count == 1:
        assert metrics["rollout/cached_prompt_tokens"] == 0


def dies(number: int) -> None:
    if number >= 9:
        raise SamplerLostError("killed by signal 9")


def hangs(number: int) -> Any:
    return asyncio.sleep(60) if number >= 9 else None


@pytest.mark.parametrize("fault", [dies, hangs])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_lost_replica_is_replaced_and_its_requests_are_asked_elsewhere(
    group: Callable[..., Group], expected: list[tuple[int, ...]], fault: Any, count: int
) -> None:
    doubles = group(count)
    lost = doubles.made[count - 1]
    lost.fault = fault
    found = asyncio.run(episodes(doubles.replicas))
    assert found == expected
    assert lost.closed
    assert len(doubles.made) == count + 1
    metrics = doubles.replicas.metrics()
    assert metrics["rollout/sampler_restarts"] == 1
    assert metrics["rollout/moved_requests"] >= 1
    train(doubles.engine)  # publishes
    assert doubles.serving(count - 1) is doubles.made[-1]
    assert sample_all(doubles.engine, [SampleRequest((40, 41), 4, seed=1)])[0].version == 1


def test_a_lost_replica_is_replaced_with_the_next_weights_if_the_learner_trains_meanwhile(
    group: Callable[..., Group], expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles = group(2, ahead=True)
    doubles.made[0].fault = dies

    async def publish(folder: Path) -> WeightsHandle:
        raise AssertionError("the learner was asked while it may be training")

    with monkeypatch.context() as patch:
        patch.setattr(doubles.learner, "publish", publish)
        assert asyncio.run(episodes(doubles.replicas)) == expected
    assert len(doubles.made) == 2
    train(doubles.engine)
    assert doubles.serving(0) is doubles.made[2]


def test_the_learner_is_left_alone_until_every_replica_was_compared(group: Callable[..., Group]) -> None:
    """Otherwise a comparison would wait for the learner, which has other weights by then."""
    doubles = group(2)

    async def watch() -> list[bool]:
        verified = asyncio.ensure_future(doubles.replicas.verified())
        before = asyncio.ensure_future(doubles.replicas.verified())
        await asyncio.sleep(0.1)
        assert not before.done()
        playing = asyncio.ensure_future(episodes(doubles.replicas))
        await verified
        compared = [replica.compared for replica in doubles.replicas._replicas]
        await asyncio.gather(playing, before)
        return compared

    assert asyncio.run(watch()) == [True, True]


def test_a_request_that_no_sampler_survives_is_an_error(group: Callable[..., Group]) -> None:
    def fatal(double: Double) -> None:
        double.fault = lambda number: dies(99)

    doubles = group(2)
    doubles.prepare = fatal
    for double in doubles.made:
        fatal(double)
    with pytest.raises(EngineFailedError, match="a request failed on 3 samplers in turn; the last: killed by signal 9"):
        asyncio.run(doubles.replicas.sample(SampleRequest((40,), 4, seed=1)))


def test_starting_anew_has_a_limit(group: Callable[..., Group]) -> None:
    doubles = group(1)
    doubles.prepare = lambda double: setattr(double, "fault", lambda number: dies(99))
    doubles.made[0].fault = lambda number: dies(99)
    for _ in range(3):
        with pytest.raises(EngineFailedError):
            asyncio.run(doubles.replicas.sample(SampleRequest((40,), 4, seed=1)))
    assert len(doubles.made) == 1 + MAX_STARTS
    with pytest.raises(EngineFailedError, match="no sampler is left, and none could be started anew: killed by"):
        asyncio.run(doubles.replicas.sample(SampleRequest((40,), 4, seed=1)))
    doubles.prepare = lambda double: None
    asyncio.run(doubles.engine.publish())  # the next update tries again
    assert sample_all(doubles.engine, [SampleRequest((40,), 4, seed=1)])[0].tokens


def test_a_replica_that_can_not_be_started_anew_leaves_the_work_to_the_others(
    group: Callable[..., Group], expected: list[tuple[int, ...]]
) -> None:
    doubles = group(2)
    doubles.made[0].fault = dies
    doubles.prepare = lambda double: setattr(double, "failing_loads", 1)
    assert asyncio.run(episodes(doubles.replicas)) == expected
    assert {int(request.session or "") for request in doubles.made[1].requests} == set(range(12))


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stale", [0, 1])
def test_weights_that_never_arrive_end_the_run(group: Callable[..., Group], stale: int) -> None:
    doubles = group(2)
    doubles.made[stale].stale = True
    asyncio.run(episodes(doubles.replicas))  # the first weights are the learner's
    train(doubles.engine, 3, learning_rate=0.01)
    with pytest.raises(EngineFailedError, match=rf"replica {stale} of the sampler.*after update 3 differ.*its weights"):
        asyncio.run(episodes(doubles.replicas))


def test_a_few_tokens_are_not_compared(group: Callable[..., Group]) -> None:
    """In half precision a single token may differ by more than the mean."""
    doubles = group(1)
    doubles.made[0].stale = True
    train(doubles.engine, 3, learning_rate=0.01)
    requests = [SampleRequest((40, n), 1, seed=n) for n in range(COMPARED_TOKENS - 1)]
    sample_all(doubles.engine, requests)
    sample_all(doubles.engine, [SampleRequest((40, 41), 8, seed=1, temperature=0.0)])  # no log-probs to compare
    with pytest.raises(EngineFailedError, match=f"first {COMPARED_TOKENS} tokens"):
        sample_all(doubles.engine, requests[:1])


def test_a_learner_that_is_ahead_is_not_compared_with(group: Callable[..., Group]) -> None:
    doubles = group(1)

    async def ahead() -> None:
        await doubles.learner.forward_backward(DATA.batch(), lambda p, signals: (p.chosen.sum(), {}))
        await doubles.learner.step(0.05)

    asyncio.run(ahead())
    assert asyncio.run(episodes(doubles.replicas))


@pytest.mark.parametrize("failures", [1, 2])
def test_a_replica_that_fails_to_load_is_started_anew_once(group: Callable[..., Group], failures: int) -> None:
    doubles = group(2)
    doubles.made[1].failing_loads = 1
    doubles.prepare = lambda double: setattr(double, "failing_loads", failures - 1)
    if failures == 2:
        with pytest.raises(EngineFailedError, match="killed while it loaded"):
            train(doubles.engine)
        return
    train(doubles.engine)
    assert (doubles.made[1].closed, doubles.serving(1)) == (True, doubles.made[2])
    assert doubles.replicas.metrics()["rollout/sampler_restarts"] == 1


def test_settings_that_do_not_fit_are_not_tried_twice(group: Callable[..., Group]) -> None:
    doubles = group(2)

    async def refuse(weights: WeightsHandle) -> None:
        raise UserError("engine.python has no vLLM")

    doubles.made[0].load = refuse  # type: ignore[method-assign]
    with pytest.raises(UserError, match="no vLLM"):
        train(doubles.engine)
    assert len(doubles.made) == 2


def test_weights_from_memory(group: Callable[..., Group], expected: list[tuple[int, ...]]) -> None:
    """After the first weights nothing is written, unless a replica has to be started anew."""
    doubles = group(2)
    for double in doubles.made:
        double.in_memory = True
    assert doubles.replicas.inbox is not None
    train(doubles.engine)
    assert doubles.replicas.inbox is None
    train(doubles.engine)
    before = asyncio.run(episodes(doubles.replicas))
    doubles.made[0].fault = lambda number: dies(99)
    assert asyncio.run(episodes(doubles.replicas)) == before
    assert doubles.serving(0) is doubles.made[2]
    assert doubles.made[2].inbox is not None
    train(doubles.engine)
    assert asyncio.run(episodes(doubles.replicas)) != before


def test_no_weights_are_left_in_a_folder(group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed could not remove them."""
    made: list[Path] = []
    monkeypatch.setattr(replicas, "weights_folder", lambda size: made.append(weights_folder(size)) or made[-1])
    doubles = group(2)
    doubles.made[0].fault = dies
    asyncio.run(episodes(doubles.replicas))
    train(doubles.engine)
    assert len(made) == 2
    assert not any(folder.exists() for folder in made)


# -- vLLM's settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "device", "visible", "gpus"),
    [
        ({}, "cuda:0", 1, [None]),
        ({"replicas": 2}, "cpu", 0, [None, None]),
        ({"replicas": 2}, "cuda:0", 4, [[1], [2]]),
        ({"replicas": 2}, "cuda:1", 2, [[0], [1]]),
        ({"replicas": 2, "gpus": [1, 2, 3, 4]}, "cuda:0", 8, [[1, 2], [3, 4]]),
    ],
)
def test_gpus_are_shared_out(options: dict[str, Any], device: str, visible: int, gpus: list[Any]) -> None:
    settings = VllmOptions(**options)
    assert [settings.of_replica(n, device, visible).gpus for n in range(settings.replicas)] == gpus


@pytest.mark.parametrize(
    ("options", "visible", "words"),
    [
        ({"replicas": 4}, 2, r"engine\.replicas is 4, but this process sees 2 GPUs"),
        ({"replicas": 2, "gpus": [0, 2]}, 2, r"engine\.gpus is \[0, 2\], but this process sees 2 GPUs"),
        ({"replicas": 2, "gpus": [0, 1, 2]}, 4, r"can't be shared out among 2 replicas"),
        ({"replicas": 2, "gpus": [1, 1]}, 4, r"name each GPU once"),
    ],
)
def test_gpus_that_do_not_suffice_are_refused(options: dict[str, Any], visible: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        VllmOptions(**options).of_replica(0, "cuda:0", visible)


def test_gpus_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"engine\.gpus is \[97\]"):
        VllmOptions(gpus=[97]).check(EngineSpec("no model", seed=0, device="cpu"))
