"""An engine in two ranks keeps the promises of an engine; its checkpoints are those of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import tiny
from engines.ranks.kit import in_ranks, one_process
from engines.tiny import DATA, conforms
from skillsd.engines.base import Engine, SampleRequest, StepReport
from skillsd.engines.conformance import CHECKS, Check, Subject, kit, sampling
from skillsd.engines.conformance.kit import WEIGHTED
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch.ranks.orders import Ranks
from skillsd.engines.torch.ranks.rounds import Finished, Round, RoundDecoder

Folder = Callable[[str], Path]
FAST = {("layers", sampling.sampling_follows_the_published_weights), ("layers", sampling.teacher_is_sampled)}


@pytest.mark.parametrize(
    ("shard", "check"),
    [
        pytest.param(shard, check, marks=[] if (shard, check) in FAST else [pytest.mark.slow])
        for shard in ("state", "layers")
        for check in CHECKS
    ],
)
def test_engine_conforms(shard: str, check: Check, ranks: Ranks, model_folder: Folder) -> None:
    folder = model_folder("llama")

    def make(*, snapshot_teacher: bool = False, micro_batch_tokens: int = 8192) -> Engine:
        return in_ranks(
            ranks,
            shard,
            folder,
            teacher_follows=not snapshot_teacher,
            micro_batch_tokens=micro_batch_tokens,
            max_grad_norm=1.0,
        )

    conforms(check, Subject(make, tiny.Plain(folder).logprobs))


# -- checkpoints -----------------------------------------------------------------------------------------------------

OWN: dict[str, Any] = {"teacher_follows": False}
LORA: dict[str, Any] = {"lora": LoraOptions(rank=4, alpha=8), "dtype": "bfloat16", **OWN}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("written", "read", "options"),
    [
        ("state", "one", OWN),
        ("one", "layers", OWN),
        pytest.param("layers", "one", OWN, marks=slow),
        pytest.param("layers", "state", LORA, marks=slow),
        pytest.param("state", "layers", {"dtype": "bfloat16", **OWN}, marks=slow),
        pytest.param("one", "state", LORA, marks=slow),
        pytest.param("state", "state", {"dtype": "bfloat16", **OWN}, marks=slow),
        pytest.param("layers", "layers", LORA, marks=slow),
    ],
)
def test_a_checkpoint_moves_between_numbers_of_ranks(
    written: str, read: str, options: dict[str, Any], ranks: Ranks, model_folder: Folder, tmp_path: Path
) -> None:
    """Training goes on as it would have; bit for bit where the number of ranks is the same."""
    folder = model_folder("qwen3")

    def make(kind: str) -> Engine:
        return one_process(folder, **options) if kind == "one" else in_ranks(ranks, kind, folder, **options)

    async def train(engine: Engine, steps: int) -> list[StepReport]:
        reports = await DATA.train(engine, steps)
        await engine.learner.sync_teacher(0.3)
        return reports

    async def go() -> None:
        first, second = make(written), make(read)
        await train(first, 2)
        await first.learner.save_state(tmp_path)
        await second.load_state(tmp_path)
        reports = [await train(engine, 2) for engine in (first, second)]
        assert [r.version for r in reports[1]] == [3, 4]
        views = [await DATA.view(e, w) for w in ("student", "teacher") for e in (first, second)]  # type: ignore[arg-type]
        if written == read:
            assert reports[0] == reports[1]
            assert torch.equal(views[0], views[1])
            assert torch.equal(views[2], views[3])
        else:
            close = 1e-4 if "dtype" not in options else 0.1
            norms = [[r.grad_norm for r in some] for some in reports]
            assert norms[1] == pytest.approx(norms[0], rel=close)
            assert kit.gap(views[0], views[1]) < 10 * close
            assert kit.gap(views[2], views[3]) < 10 * close

    asyncio.run(go())


@pytest.mark.parametrize("shard", [pytest.param("state", marks=slow), "layers"])
def test_written_weights_are_the_students(shard: str, ranks: Ranks, model_folder: Folder, tmp_path: Path) -> None:
    """`publish` into a folder and `export` write whole weights, after the update."""
    engine = in_ranks(ranks, shard, model_folder("llama"))
    asyncio.run(DATA.train(engine))
    asyncio.run(engine.learner.publish(tmp_path / "published"))
    tiny.assert_is_written(engine, tmp_path / "published")
    asyncio.run(engine.learner.export(tmp_path / "exported"))
    plain = tiny.Plain(tmp_path / "exported")
    sequence = tiny.marked_all(DATA.ids(20, 0))
    assert kit.gap(tiny.distribution(engine, sequence), plain.logprobs(sequence.tokens)[:-1]) < 5e-5


# -- sampling in rounds ----------------------------------------------------------------------------------------------


def test_both_ranks_sample(ranks: Ranks, model_folder: Folder) -> None:
    """Every episode gets the tokens that it gets in one process, turn by turn, half of them from the other rank."""
    engine, alone = in_ranks(ranks, "state", model_folder("llama")), one_process(model_folder("llama"))
    played: list[dict[str, int]] = []
    decoder = engine.learner.decoders["student"]  # type: ignore[attr-defined]
    play = decoder._play

    def spy(news: list[Round]) -> list[Finished]:
        played.append({"mine": len(news[0].started), "theirs": len(news[1].started)})
        found: list[Finished] = play(news)
        return found

    decoder._play = spy

    async def episode(one: Engine, number: int) -> list[tuple[int, ...]]:
        tokens, turns = DATA.ids(9, number % 3), []
        for turn in range(3):
            request = SampleRequest(tokens, 6, seed=10 * number + turn, session=f"episode {number}")
            sample = await one.sampler.sample(request)
            turns.append(sample.tokens)
            tokens = (*tokens, *sample.tokens, *DATA.ids(3, turn))
        one.sampler.end_session(f"episode {number}")
        return turns

    async def all_of(one: Engine) -> list[list[tuple[int, ...]]]:
        return list(await asyncio.gather(*(episode(one, number) for number in range(8))))

    assert asyncio.run(all_of(engine)) == asyncio.run(all_of(alone))
    assert played[0] == {"mine": 4, "theirs": 4}
    assert sum(p["theirs"] for p in played) == 12  # a session stays with its rank
    asyncio.run(engine.learner.forward_backward(DATA.batch(), WEIGHTED))  # the ended sessions are freed before it
    assert not decoder._homes


def rounds() -> tuple[RoundDecoder, list[list[Round]]]:
    """A decoder over two ranks that answer a request in the round after it came."""
    seen: list[list[Round]] = []

    def play(news: Any) -> list[Finished]:
        seen.append(list(news))
        before = seen[-2] if len(seen) > 1 else [Round(), Round()]
        gone = {number for one in news for number in one.cancelled}
        return [dict.fromkeys(one.started.keys() - gone, ((7,), (0.0,), True)) for one in before]

    return RoundDecoder(2, play), seen


def request(session: str | None) -> SampleRequest:
    return SampleRequest((1, 2), 4, seed=0, session=session)


def test_new_sessions_go_where_least_are_kept() -> None:
    decoder, seen = rounds()

    async def go() -> None:
        await asyncio.gather(*(decoder.sample(request(name)) for name in ("a", "b", "c", None)))
        decoder.end_session("a")
        decoder.end_session("c")  # both of one rank
        await asyncio.gather(*(decoder.sample(request(name)) for name in ("d", "b")))

    asyncio.run(go())
    names = [[[r.session for r in one.started.values()] for one in news] for news in seen if news[0].started]
    assert names[0] == [["a", "c"], ["b", None]]
    assert names[1] == [["d"], ["b"]]
    assert [one.ended for news in seen for one in news if one.ended] == [["a", "c"]]


def test_a_request_that_is_no_longer_awaited_is_cancelled_in_its_rank() -> None:
    decoder, seen = rounds()

    async def go() -> None:
        late = asyncio.ensure_future(decoder.sample(request("late")))
        other = asyncio.ensure_future(decoder.sample(request("other")))
        while not seen:
            await asyncio.sleep(0)
        late.cancel()
        decoder.end_session("late")
        await other

    asyncio.run(go())
    assert seen[1][0].cancelled == [1]
    assert seen[1][0].ended == ["late"]
