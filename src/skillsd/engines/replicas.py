"""Several samplers as one: a session stays where its KV cache is, and a sampler that fails is replaced.

A request's seed and tokens determine its sample, so a request that a failed replica did not answer is asked again
elsewhere, with the same result.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from skillsd.engines.base import Learner, Sample, Sampler, SampleRequest, TokenSequence, WeightsHandle
from skillsd.engines.weights_folder import weights_folder
from skillsd.errors import EngineFailedError, SamplerLostError

log = logging.getLogger(__name__)

MAX_STARTS = 3
"""Most times that a replica is started between two updates; if it fails again, the others do its work."""
COMPARED_TOKENS = 32
"""Number of tokens of each replica whose log-probs are compared with the learner's after each update."""


@dataclass(eq=False)
class _Replica:
    """One sampler and what is known about it.

    Attributes:
        thread: runs the calls that block: making, loading, closing. One thread, so they happen in order.
        sampler: None while there is none: it is being started, or could not be.
        sessions: the open sessions whose cache it holds.
        compared: whether log-probs were compared with the learner's since the last update.
        to_compare: requests of one temperature and their samples, to do that with; None once they are being compared.
    """

    number: int
    sampler: Sampler | None
    thread: ThreadPoolExecutor
    sessions: set[str] = field(default_factory=set)
    under_way: int = 0
    prompt_tokens: int = 0
    starting: Future[None] | None = None
    starts: int = 0
    compared: bool = False
    to_compare: list[tuple[SampleRequest, Sample]] | None = field(default_factory=list)

    @property
    def load(self) -> tuple[int, int, int]:
        return len(self.sessions), self.under_way, self.number


class Replicas(Sampler):
    """Shares sessions out to N samplers.

    A new session goes to the replica with the fewest open ones. A replica that raises `SamplerLostError` is closed and
    made anew in the background with the published weights, and its requests and sessions go to the others. After each
    update, the log-probs of each replica's first tokens are compared with the learner's: a large difference means that
    its weights are not the learner's, and ends the run.

    Args:
        make: makes the sampler of a number, from 0. Calls of it, and of the sampler's `load` and `close`, come from
            other threads.
        learner: publishes the weights, and scores the compared tokens.
        tolerance: the largest mean absolute difference of the compared log-probs.
        ahead: the learner trains meanwhile, so a lost sampler is made anew only with the next weights.
    """

    def __init__(
        self, make: Callable[[int], Sampler], count: int, learner: Learner, *, tolerance: float, ahead: bool = False
    ) -> None:
        self._make, self._learner, self._tolerance, self._ahead = make, learner, tolerance, ahead
        self._replicas: list[_Replica] = []
        self._version = 0  # of the loaded weights
        self._lost: EngineFailedError | None = None  # why the last lost replica was lost
        self._counts: Counter[str] = Counter()
        self._loading = False
        self.folder = weights_folder(learner.published_bytes)
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        try:
            for number in range(count):
                thread = ThreadPoolExecutor(1, thread_name_prefix=f"replica {number}")
                self._replicas.append(_Replica(number, make(number), thread))
        except BaseException:
            self.close()
            raise
        self.max_length = min(sampler.max_length for sampler in self.samplers)

    @property
    def samplers(self) -> list[Sampler]:
        """Those that can be asked."""
        return [replica.sampler for replica in self._replicas if replica.sampler is not None]

    @property
    def inbox(self) -> Path | None:  # type: ignore[override]
        """One folder for all; each replica gets links to the files. None if every one takes weights from memory."""
        samplers = [replica.sampler for replica in self._replicas]
        if not any(sampler is None or sampler.inbox for sampler in samplers):
            return None
        self.folder.mkdir(exist_ok=True)
        return self.folder

    # -- sampling -----------------------------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Sample:
        for _ in range(len(self._replicas) + 1):
            replica = await self._place(request.session)
            sampler = replica.sampler
            assert sampler is not None
            replica.prompt_tokens += len(request.tokens)
            replica.under_way += 1
            try:
                sample = await sampler.sample(request)
            except SamplerLostError as error:
                self._counts["moved"] += 1
                await self._replace(replica, sampler, error)
                continue
            finally:
                replica.under_way -= 1
            await self._compare(replica, request, sample)
            return sample
        raise EngineFailedError(
            f"a request failed on {len(self._replicas) + 1} samplers in turn; the last: {self._lost}"
        )

    def end_session(self, session: str) -> None:
        for replica in self._replicas:
            if session in replica.sessions:
                replica.sessions.discard(session)
                if replica.sampler is not None:
                    replica.sampler.end_session(session)

    async def _place(self, session: str | None) -> _Replica:
        """The replica that holds the session, or else the one with the fewest. Waits while there is none to ask."""
        while self._loading:
            await asyncio.sleep(0.05)
        while True:
            # Before looking for samplers: one that has been started in between is there, and not taken for failed.
            starting = [r.starting for r in self._replicas if r.starting is not None and not r.starting.done()]
            if alive := [replica for replica in self._replicas if replica.sampler is not None]:
                break
            if not starting:
                raise EngineFailedError(f"no sampler is left, and none could be started anew: {self._lost}")
            await asyncio.wait([asyncio.wrap_future(one) for one in starting], return_when=asyncio.FIRST_COMPLETED)
        holder = next((replica for replica in alive if session in replica.sessions), None)
        replica = holder or min(alive, key=lambda replica: replica.load)
        if session is not None:
            replica.sessions.add(session)
        return replica

    async def _compare(self, replica: _Replica, request: SampleRequest, sample: Sample) -> None:
        """Compare the log-probs of the first tokens after an update with the learner's, in one call."""
        pairs = replica.to_compare
        if pairs is None or request.weights != "student":
            return
        if not request.temperature == (pairs[0][0] if pairs else request).temperature > 0:
            return
        pairs.append((request, sample))
        if sum(len(sample.tokens) for _, sample in pairs) < COMPARED_TOKENS:
            return
        replica.to_compare = None
        if all(sample.version == self._learner.version for _, sample in pairs):  # otherwise the learner is ahead
            await self._check(replica, pairs)
        replica.compared = True

    async def verified(self) -> None:
        """Wait until the first tokens of every replica since the last update have been compared."""
        while not all(replica.compared for replica in self._replicas if replica.sampler is not None):
            await asyncio.sleep(0.05)

    async def _check(self, replica: _Replica, pairs: Sequence[tuple[SampleRequest, Sample]]) -> None:
        request, sample = pairs[-1]
        sequences = [_marked(request, sample) for request, sample in pairs]
        found = await self._learner.logprobs(sequences, temperature=request.temperature)
        ours = [p for answer in found for p in answer.chosen.tolist()]
        theirs = [p for _, sample in pairs for p in sample.logprobs]
        mean = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
        if not mean <= self._tolerance:
            raise EngineFailedError(
                f"replica {replica.number} of the sampler: the log-probs of its first {len(ours)} tokens after update "
                f"{sample.version} differ from the learner's by {mean:.3g} on average, expected at most "
                f"{self._tolerance:g} (engine.logprob_tolerance): its weights are not the learner's. Resume from the "
                "last checkpoint; if it happens again, try engine.weights=file"
            )

    # -- replicas that fail -------------------------------------------------------------------------------------

    async def _replace(self, replica: _Replica, sampler: Sampler, error: SamplerLostError) -> None:
        """Give up a sampler, and start another in the background if the weights can be had."""
        if replica.sampler is not sampler:  # another of its requests was first
            return
        self._give_up(replica, error)
        if self._ahead or replica.starts == MAX_STARTS or self._learner.version != self._version:
            return  # with the next update's weights
        replica.starts += 1
        self._counts["restarts"] += 1
        folder = weights_folder(self._learner.published_bytes)
        weights = await self._learner.publish(folder)
        replica.starting = replica.thread.submit(self._load_one, replica, weights)
        replica.starting.add_done_callback(self._report)
        replica.thread.submit(shutil.rmtree, folder)

    def _give_up(self, replica: _Replica, error: SamplerLostError) -> None:
        assert replica.sampler is not None
        log.warning("replica %d of the sampler is lost: %s", replica.number, error)
        replica.thread.submit(replica.sampler.close)
        self._lost, replica.sampler = error, None
        replica.sessions.clear()

    def _report(self, starting: Future[None]) -> None:
        if (error := starting.exception()) is not None:
            self._lost = error if isinstance(error, EngineFailedError) else EngineFailedError(str(error))
            log.warning("a sampler could not be started anew: %s", error)

    def _load_one(self, replica: _Replica, weights: WeightsHandle) -> None:
        """Load the weights into the replica's sampler, a new one if there is none. Runs in the replica's thread."""
        sampler = replica.sampler or self._make(replica.number)
        try:
            asyncio.run(sampler.load(self._hand_over(sampler, weights)))
        except BaseException:
            replica.sampler = None
            sampler.close()
            raise
        replica.sampler = sampler

    def _hand_over(self, sampler: Sampler, weights: WeightsHandle) -> WeightsHandle:
        """The handle for one sampler: in memory, or of its own inbox, with links to the published files."""
        if sampler.inbox is None:
            return WeightsHandle(weights.version)
        assert weights.location is not None
        for old in sampler.inbox.glob("*.safetensors"):
            old.unlink()
        for file in Path(weights.location).iterdir():
            link = sampler.inbox / f"{file.name}.new"
            _link(file, link)
            link.replace(sampler.inbox / file.name)
        return WeightsHandle(weights.version, str(sampler.inbox))

    # -- weights ------------------------------------------------------------------------------------------------

    async def load(self, weights: WeightsHandle) -> None:
        """Load the weights into all replicas at the same time; one that can't is started anew, once. Requests wait.

        Raises:
            EngineFailedError, UserError: if a replica can't load them.
        """
        self._loading = True
        try:
            for replica in self._replicas:
                if replica.starting is not None:  # with the weights before
                    await asyncio.wait([asyncio.wrap_future(replica.starting)])
                replica.starting, replica.starts = None, 0
                replica.compared, replica.to_compare = False, []
                replica.sessions.clear()
            self._version = weights.version
            if failed := await self._load_all(self._replicas, weights):
                log.warning("%s; starting anew", "; ".join(f"replica {r.number}: {e}" for r, e in failed.items()))
                self._counts["restarts"] += len(failed)
                if weights.location is None:
                    weights = await self._learner.publish(self.inbox)
                for error in (await self._load_all([*failed], weights)).values():
                    raise error
        finally:
            self._loading = False
            shutil.rmtree(self.folder, ignore_errors=True)  # or they would outlive a process that is killed

    async def _load_all(
        self, replicas: Sequence[_Replica], weights: WeightsHandle
    ) -> dict[_Replica, EngineFailedError]:
        """Load the weights, all at the same time. Returns the replicas that failed.

        Raises:
            UserError: if the settings don't fit, which a second attempt would not change.
        """
        loads = [asyncio.wrap_future(replica.thread.submit(self._load_one, replica, weights)) for replica in replicas]
        failed = {}
        for replica, error in zip(replicas, await asyncio.gather(*loads, return_exceptions=True), strict=True):
            if isinstance(error, EngineFailedError):
                failed[replica] = error
            elif error is not None:
                raise error
        return failed

    async def sleep(self) -> None:
        for replica in self._replicas:
            if (sampler := replica.sampler) is not None:
                try:
                    await sampler.sleep()
                except SamplerLostError as error:  # the next `load` starts another
                    self._give_up(replica, error)

    def metrics(self) -> dict[str, float]:
        """The samplers' metrics, averaged with the number of prompt tokens as weight, and those of failures."""
        sums: defaultdict[str, float] = defaultdict(float)
        tokens: Counter[str] = Counter()
        for replica in self._replicas:
            found = replica.sampler.metrics() if replica.sampler is not None else {}
            for name, value in found.items():
                sums[name] += value * replica.prompt_tokens
                tokens[name] += replica.prompt_tokens
            replica.prompt_tokens = 0
        counts, self._counts = self._counts, Counter()
        return {
            **{name: total / tokens[name] for name, total in sums.items() if tokens[name]},
            "rollout/sampler_restarts": counts["restarts"],
            "rollout/moved_requests": counts["moved"],
        }

    def close(self) -> None:
        for replica in self._replicas:
            replica.thread.shutdown()
            if replica.sampler is not None:
                replica.sampler.close()
        self._remove()


def _marked(request: SampleRequest, sample: Sample) -> TokenSequence:
    """The whole sequence, with the sampled tokens marked."""
    return TokenSequence(
        (*request.tokens, *sample.tokens), (*[False] * len(request.tokens), *[True] * len(sample.tokens))
    )


def _link(file: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    try:
        os.link(file, link)
    except OSError:  # another file system
        shutil.copyfile(file, link)
