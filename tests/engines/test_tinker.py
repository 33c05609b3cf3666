"""The Tinker engine over a fake of the protocol: promises, both routes to a gradient, whole runs, exports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tinker", reason="the SDK is not installed: pip install tinker")

from toy_env import Toy
from toy_run import Listener, toy_settings

from engines import tiny
from engines.fake_tinker import SEEDS, FakeServer, SameSeeds, adapter_engine
from engines.tiny import conforms
from skillsd.config import RunConfig
from skillsd.engines.base import Engine, Learner, Loss, SampleRequest, TokenSequence, TrainItem
from skillsd.engines.conformance import CHECKS, Check, Subject, learning
from skillsd.engines.conformance.kit import WEIGHTED, chosen
from skillsd.engines.options import EngineSpec, LoraOptions
from skillsd.engines.tinker import servers
from skillsd.engines.tinker.engine import TinkerEngine
from skillsd.engines.tinker.options import TinkerOptions
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.options import TorchOptions
from skillsd.errors import EngineFailedError
from skillsd.metrics import Histogram
from skillsd.objective import ACTION_MASK, IMITATION_MASK, SAMPLER_DIFF, TEACHER_MASK, Objective
from skillsd.runs.build import build
from skillsd.runs.checks import engine_spec
from skillsd.training import checkpoint
from skillsd.training.loop import train

Folder = Callable[[str], Path]
Settings = dict[str, Any]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-secret-of-the-test")


@pytest.fixture(scope="module")
def folder(model_folder: Folder) -> Path:
    return model_folder("llama")


def engine_of(server: FakeServer, *, teacher: Any = "student", rank: int = 4, **options: Any) -> Engine:
    made = TinkerOptions(server="tinker" if server.sums else "skyrl-jax", **options)
    spec = EngineSpec(
        model=str(server.folder), seed=1, lora=LoraOptions(rank=rank), teacher=teacher, max_grad_norm=torch.inf
    )
    engine = TinkerEngine(made, spec, server.connect)
    return Engine(engine, engine, "tinker", replace(made.provides(), exact_resume=True))


# -- the promises of an engine --------------------------------------------------------------------------------------

CASES = [(True, check) for check in CHECKS] + [
    (False, check)
    for check in (
        learning.gradient_does_not_depend_on_micro_batches,
        learning.gradients_accumulate,
        learning.what_is_not_finite_is_refused,
    )
]


@pytest.mark.parametrize(
    ("sums", "check"), CASES, ids=[f"{'sums' if sums else 'means'}-{check.__name__}" for sums, check in CASES]
)
def test_conforms(sums: bool, check: Check, folder: Path) -> None:
    server = FakeServer(folder, sums=sums)

    def make(*, snapshot_teacher: bool = False, micro_batch_tokens: int = 8192) -> Engine:
        return engine_of(server, teacher="snapshot" if snapshot_teacher else "student")

    conforms(check, Subject(make, tiny.Plain(folder).logprobs))


# -- routes to a gradient -------------------------------------------------------------------------------------------


def local_engine(folder: Path, **options: Any) -> TorchEngine:
    return adapter_engine(folder, 1, 4, **options)


async def skill_sd(engine: TorchEngine, *, off: float = 0.0) -> list[TrainItem]:
    """Items with the student's log-probs, changed by `off`, as the sampler's."""
    sequences = tiny.DATA.sequences()
    generator = torch.Generator().manual_seed(3)
    items = []
    for sequence, scored in zip(sequences, await engine.logprobs(sequences), strict=True):
        everywhere = torch.ones(sequence.marked, dtype=torch.bool)
        signals = {
            "old_logprobs": scored.chosen + off,
            "advantages": torch.randn(sequence.marked, generator=generator),
            "teacher_logprobs": scored.chosen + torch.randn(sequence.marked, generator=generator),
            ACTION_MASK: everywhere,
            TEACHER_MASK: torch.rand(sequence.marked, generator=generator) < 0.7,
            IMITATION_MASK: ~everywhere,
        }
        items.append(TrainItem(sequence, signals))
    return items


def bound(items: list[TrainItem], *, on_policy: bool) -> Loss:
    template = Objective(lambda_sdl=0.3).template
    return template.bind((item.signals for item in items), compare_with_sampler=on_policy)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("route", ["auto", "general"])
def test_both_routes_give_the_embedded_engines_gradients_and_metrics(folder: Path, route: str, sums: bool) -> None:
    """On policy, and off policy after it; one datum takes no scoring pass. Servers that average are corrected."""

    async def compare() -> None:
        server, local = FakeServer(folder, sums=sums), local_engine(folder)
        learner = engine_of(server, route=route).learner
        items = await skill_sd(local)
        for step in range(3):
            loss = bound(items, on_policy=step == 0)
            server.calls.clear()
            found, expected = await learner.forward_backward(items, loss), await local.forward_backward(items, loss)
            assert ("forward" in server.calls) == (route == "general" or step > 0)
            report, own = await learner.step(1e-2), await local.step(1e-2)
            assert report.grad_norm == pytest.approx(own.grad_norm, rel=1e-5)
            assert report.version == step + 1
            assert found.keys() == expected.keys()
            for name, metric in found.items():
                if name != SAMPLER_DIFF:
                    assert metric.value == pytest.approx(expected[name].value, rel=1e-4, abs=1e-6)  # type: ignore[union-attr]
        for a, b in zip(await scores(learner), await scores(local), strict=True):
            assert torch.allclose(a, b, atol=1e-4)

    asyncio.run(compare())


def test_metrics_of_one_datum_are_of_the_servers_logprobs(folder: Path) -> None:
    """Not of those that the sampler reported, whose difference from them is a metric."""

    async def differ(off: float) -> Histogram:
        local = local_engine(folder)
        items = await skill_sd(local, off=off)
        found = await engine_of(FakeServer(folder)).learner.forward_backward(items, bound(items, on_policy=True))
        difference = found[SAMPLER_DIFF]
        assert isinstance(difference, Histogram)
        return difference

    assert asyncio.run(differ(0.25)).quantile(0.5) == pytest.approx(0.25, rel=0.1)
    assert asyncio.run(differ(0.0)).quantile(1.0) < 1e-4


def test_a_sampler_of_other_weights_stops_the_run_before_the_step(folder: Path) -> None:
    async def differ() -> None:
        server = FakeServer(folder)
        items = await skill_sd(local_engine(folder), off=1.5)
        with pytest.raises(EngineFailedError, match=r"differ by 1\.50 nats on average.*resumed"):
            await engine_of(server).learner.forward_backward(items, bound(items, on_policy=True))
        assert "optim_step" not in server.calls

    asyncio.run(differ())


def poison(student: Any, signals: Any) -> Any:
    return student.chosen.sum() * torch.inf, {}


def test_what_is_at_the_server_can_not_be_forgotten(folder: Path) -> None:
    """A batch of one datum is sent at once. What would then be wrong is refused: a later loss that is not finite, and
    a later batch where the server takes means over all of a step."""

    async def after_one_datum(loss: Loss | None, *, sums: bool) -> None:
        items = await skill_sd(local_engine(folder))
        learner = engine_of(FakeServer(folder, sums=sums)).learner
        await learner.forward_backward(items, bound(items, on_policy=True))
        await learner.forward_backward(items, loss or bound(items, on_policy=False))
        assert (await learner.step(1e-3)).applied

    for loss, sums, words in ((poison, True, "is not finite"), (None, False, "does not add up")):
        with pytest.raises(EngineFailedError, match=words):
            asyncio.run(after_one_datum(loss, sums=sums))
    asyncio.run(after_one_datum(None, sums=True))


def test_nothing_is_sent_beside_what_is_not_finite(folder: Path) -> None:
    async def poisoned() -> None:
        server = FakeServer(folder)
        items = await skill_sd(local_engine(folder))
        learner = engine_of(server).learner
        await learner.forward_backward(items, poison)
        await learner.forward_backward(items, bound(items, on_policy=True))
        assert not (await learner.step(1e-3)).applied
        assert "forward_backward" not in server.calls
        await learner.forward_backward(items, bound(items, on_policy=True))
        assert (await learner.step(1e-3)).applied

    asyncio.run(poisoned())


def test_sequences_without_gradient_are_not_sent(folder: Path) -> None:
    """As those of a group with equal rewards and no teacher: they would cost a pass."""

    async def count() -> None:
        server = FakeServer(folder)
        learner = engine_of(server, route="general").learner
        items = await skill_sd(local_engine(folder))
        silent = {"advantages": torch.zeros(items[0].sequence.marked)}
        silent[TEACHER_MASK] = torch.zeros(items[0].sequence.marked, dtype=torch.bool)
        items[0] = TrainItem(items[0].sequence, {**items[0].signals, **silent})
        await learner.forward_backward(items, bound(items, on_policy=False))
        assert isinstance(learner, TinkerEngine)
        assert len(learner._pending) == len(items) - 1

    asyncio.run(count())


def test_a_step_without_gradient_moves_the_weights_as_the_embedded_engines_does(folder: Path) -> None:
    """By Adam's moments, which an earlier gradient left."""

    async def compare() -> None:
        local, learner = local_engine(folder), engine_of(FakeServer(folder), route="general").learner
        for scale in (1.0, 0.0):
            for one in (learner, local):
                await one.forward_backward(tiny.DATA.batch(scale=scale), WEIGHTED)
                assert (await one.step(1e-2)).version == 2 - scale
        for a, b in zip(await scores(learner), await scores(local), strict=True):
            assert torch.allclose(a, b, atol=1e-5)

    asyncio.run(compare())


async def scores(learner: Learner) -> list[Tensor]:
    return await chosen(learner, tiny.DATA.sequences())


def test_clipping_and_adam_are_the_recipes(folder: Path) -> None:
    async def compare() -> None:
        local = local_engine(folder, max_grad_norm=0.01, betas=(0.5, 0.6))
        spec = EngineSpec(str(folder), 1, lora=LoraOptions(rank=4), max_grad_norm=0.01, betas=(0.5, 0.6))
        learner = TinkerEngine(TinkerOptions(), spec, FakeServer(folder).connect)
        items = await skill_sd(local)
        for _ in range(3):
            for one in (learner, local):
                await one.forward_backward(items, bound(items, on_policy=False))
                await one.step(1e-2)
        for a, b in zip(await scores(learner), await scores(local), strict=True):
            assert torch.allclose(a, b, atol=1e-4)

    asyncio.run(compare())


# -- whole runs -----------------------------------------------------------------------------------------------------

RUN: Settings = {"model": {"lora": {"rank": 4}}, "training": {"iterations": 4}, "checkpoint": {"every": 2}}


AHEAD: Settings = {"training": {"iterations": 4, "ahead": 1}, "objective": {"importance_cap": 2.0}}


def config_of(model: Path, engine: str, **more: Any) -> RunConfig:
    return RunConfig.model_validate(toy_settings(model, **{**RUN, **more}, engine={"name": engine}))


@pytest.mark.parametrize("more", [{}, AHEAD], ids=["in-turn", "ahead"])
def test_a_run_with_a_resume_equals_the_embedded_engines(tiny_model: Path, tmp_path: Path, more: Settings) -> None:
    """Sampling, teacher's scores, updates, evaluations, checkpoints; also if it samples while it trains."""
    config = config_of(tiny_model, "torch", **more)
    spec = engine_spec(config)
    local = adapter_engine(tiny_model, spec.seed % SEEDS, 4, kind=SameSeeds, max_grad_norm=spec.max_grad_norm)
    expected = Listener()
    (tmp_path / "torch").mkdir()
    engine = Engine(local, local, "torch", TorchOptions.capabilities)
    run = build(config, tmp_path / "torch", engine=engine, task_set=Toy())
    assert asyncio.run(train(run, expected))
    run.close()

    server, found = FakeServer(tiny_model), Listener()
    config = config_of(tiny_model, "tinker", **more)
    (tmp_path / "tinker").mkdir()

    def start() -> Any:
        there = TinkerEngine(TinkerOptions(), engine_spec(config), server.connect)
        pair = Engine(there, there, "tinker", config.engine.provides())
        return build(config, tmp_path / "tinker", engine=pair, task_set=Toy())

    first, stop = start(), iter([False, False, True])
    assert not asyncio.run(train(first, found, lambda: next(stop)))
    first.close()
    assert server.closed
    assert server.adapters == 1
    again = start()

    async def resume() -> bool:
        await checkpoint.load(again, checkpoint.find(again.folder))
        return await train(again, found)

    assert asyncio.run(resume())
    again.close()
    assert server.adapters == 2  # a resumed run makes one adapter, from the saved state
    ignored = ("time/", "memory/", "seconds", "eval/seconds", "rollout/sampled_tokens_per_second", SAMPLER_DIFF)
    for ours, theirs in (
        *zip(found.iterations, expected.iterations, strict=True),
        *zip(found.evaluations, expected.evaluations, strict=True),
    ):
        assert ours.keys() - theirs.keys() <= {"rollout/cached_prompt_tokens"}
        for name, value in theirs.items():
            if not name.startswith(ignored):
                near = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True)
                assert ours[name] == near, name
    assert all(record.get("rollout/cached_prompt_tokens", 1.0) > 0.3 for record in found.iterations)
    assert all(record.get(f"{SAMPLER_DIFF}/max", 0.0) < 1e-4 for record in found.iterations)


def test_a_snapshot_teacher_is_the_base_model_and_then_saved_weights(folder: Path, tmp_path: Path) -> None:
    """It stays while the student moves, and after a resume; before the first update it takes no adapter."""

    async def follow() -> None:
        server = FakeServer(folder)
        engine = engine_of(server, teacher="snapshot")
        learner, plain = engine.learner, tiny.Plain(folder)
        tokens = tiny.DATA.ids(12, 0)
        sequence = TokenSequence(tokens, (False, *[True] * 11))
        await learner.sync_teacher()
        [base] = await learner.logprobs([sequence], "teacher")
        rows = plain.logprobs(tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert torch.allclose(base.chosen, rows, atol=1e-5)
        assert server.adapters == 0
        await tiny.DATA.train(engine, 2)
        [still] = await learner.logprobs([sequence], "teacher")
        assert torch.equal(still.chosen, base.chosen)
        await learner.sync_teacher()
        await tiny.DATA.train(engine, 1)
        [moved] = await learner.logprobs([sequence], "teacher")
        assert not torch.allclose(moved.chosen, base.chosen, atol=1e-3)
        await learner.save_state(tmp_path)
        other = engine_of(server, teacher="snapshot")
        await other.load_state(tmp_path)
        [kept] = await other.learner.logprobs([sequence], "teacher")
        assert torch.equal(kept.chosen, moved.chosen)

    asyncio.run(follow())


def test_the_base_model_is_sampled_without_an_adapter(folder: Path) -> None:
    """As `skillsd eval --model` does, which has no LoRA."""

    async def sample() -> None:
        server = FakeServer(folder)
        engine = TinkerEngine(TinkerOptions(), EngineSpec(str(folder), 1), server.connect)
        await engine.load(await engine.publish())
        request = SampleRequest(tiny.DATA.ids(6, 0), 4, seed=1)
        tiny.Plain(folder).check(request, await engine.sample(request))
        assert server.adapters == 0

    asyncio.run(sample())


# -- exports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_exported_adapter_has_all_of_its_modules(folder: Path, tmp_path: Path, merge: bool) -> None:
    """Also from a server that writes ``target_modules: null``, of which peft would load two modules."""

    async def export() -> None:
        engine = engine_of(FakeServer(folder))
        await tiny.DATA.train(engine, 3)
        expected = await engine.learner.logprobs(tiny.DATA.sequences())
        await engine.learner.export(tmp_path / "out", merge=merge)
        if merge:
            local = TorchEngine(str(tmp_path / "out"), device="cpu")
        else:
            modules = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
            assert len(modules) == 7
            local = TorchEngine(str(folder), device="cpu", lora=LoraOptions(adapter=str(tmp_path / "out")))
        for a, b in zip(await local.logprobs(tiny.DATA.sequences()), expected, strict=True):
            assert torch.allclose(a.chosen, b.chosen, atol=1e-5)

    asyncio.run(export())


def test_every_server_is_described() -> None:
    """A recipe's word for each row of the table."""
    assert set(TinkerOptions.model_fields["server"].annotation.__args__) == servers.SERVERS.keys()  # type: ignore[union-attr]
