"""Whole runs whose skills are written by a language model: behind an endpoint that fails, and the policy itself."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import SKILL, FakeEndpoint, Reply, Request, completion
from toy_env import Toy
from toy_run import Listener, MakeRun, go, toy_settings

from skillsd import endpoint
from skillsd.config import RunConfig
from skillsd.engines.base import Sample, SampleRequest
from skillsd.errors import UserError
from skillsd.report.progress import summaries_note
from skillsd.report.writer import METRICS, read
from skillsd.skills.bank import Bank
from skillsd.training import checkpoint
from skillsd.training.loop import train
from skillsd.runs.lifecycle import run_training
from skillsd.types import Task

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", KEY)


def lesson(request: Request) -> Reply:
    """A skill of its own for every episode."""
    return completion({**SKILL, "golden_workflow": f"{hash(request.text):x}"})


def hanging(request: Request) -> Reply:
    return Reply({}, hang=60)


@pytest.fixture
def servers() -> Iterator[list[FakeEndpoint]]:
    made: list[FakeEndpoint] = []
    yield made
    for server in made:
        server.close()


def settings(server: FakeEndpoint, deterministic: bool = True, **summariser: Any) -> dict[str, Any]:
    return {
        "skills": {"summariser": "openai", "deterministic": deterministic, "teacher_extra_tokens": 200},
        "summariser": {
            "model": "a-model",
            "base_url": server.url,
            "api_key_env": "MY_KEY",
            "max_retries": 1,
            "price_in": 1.0,
            "price_out": 10.0,
            **summariser,
        },
    }


class DiesAt(Listener):
    """The server is gone after so many iterations."""

    def __init__(self, server: FakeEndpoint, iterations: int) -> None:
        super().__init__()
        self.server, self.left = server, iterations

    def iteration(self, record: dict[str, Any]) -> None:
        super().iteration(record)
        self.left -= 1
        if self.left == 0:
            self.server.close()


def test_training_goes_on_when_the_server_dies(make_run: MakeRun, servers: list[FakeEndpoint]) -> None:
    servers.append(FakeEndpoint(answer=lesson))
    run = make_run(**settings(servers[0]))
    listener = DiesAt(servers.pop(), 3)
    assert asyncio.run(train(run, listener))
    assert len(listener.iterations) == 6
    before, after = listener.iterations[2], listener.iterations[5]
    assert before["summaries/submitted"] == before["summaries/calls"] == 36
    assert before["summaries/added"] + before["summaries/duplicate"] == 36
    assert before["summaries/tokens_in"] == 3600
    assert before["summaries/cost"] == pytest.approx((3600 + 10 * 720) / 1e6)
    assert after["summaries/submitted"] == 72
    assert after["summaries/failed_connection"] == 36
    assert after["summaries/calls"] == 36 + 2 * 36
    assert after["summaries/retries"] == 36
    assert after["summaries/pending"] == 0
    assert after["summaries/cost"] == before["summaries/cost"]
    assert len(run.bank) == before["summaries/added"] > 0
    assert after["batch/groups_with_teacher"] == 1.0  # the skills that it wrote teach on
    assert summaries_note(after) == "summaries: 108 calls, 3,600 tokens in, 720 out, cost 0.0108"


def test_pending_summaries_survive_a_restart_at_another_address(
    tiny_model: Path, tmp_path: Path, servers: list[FakeEndpoint], caplog: pytest.LogCaptureFixture
) -> None:
    """From the third iteration on the server hangs; the run is stopped and goes on with a new server, at another port.

    And nowhere in the run's folder or in any log stands the key.
    """
    caplog.set_level(logging.DEBUG)
    folder = tmp_path / "run"

    def config(server: FakeEndpoint, iterations: int) -> RunConfig:
        training = {"training": {"iterations": iterations}}
        return RunConfig.model_validate(toy_settings(tiny_model, **settings(server, deterministic=False), **training))

    hangs_now = False
    servers.append(FakeEndpoint(answer=lambda request: hanging(request) if hangs_now else lesson(request)))

    def on_record(kind: str, record: Any) -> None:
        nonlocal hangs_now
        hangs_now |= kind == "iteration" and record["iteration"] == 2

    assert run_training(config(servers[0], 4), folder, on_record=on_record)
    found = checkpoint.latest(folder)
    assert found is not None
    left = json.loads((found / "state.json").read_text())
    waiting = [p["source"] for p in left["pending_summaries"] if p["skill"] is None]
    assert len(waiting) >= 24
    assert {source.split("/")[0] for source in waiting} >= {"iteration-3", "iteration-4"}
    assert left["summary_stats"]["submitted"] == 48

    servers.append(FakeEndpoint(answer=lesson))
    assert run_training(config(servers[1], 5), folder, resume=True)
    *_, record = read(folder / METRICS)
    assert record["iteration"] == 5
    assert record["summaries/submitted"] == 60
    assert record["summaries/resumed"] == len(left["pending_summaries"])
    assert record["summaries/calls"] >= left["summary_stats"]["calls"]
    asked = {request.text for request in servers[1].requests}
    assert len(asked) >= 10  # those that hung were asked for again
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"MY_KEY" in everything
    assert KEY.encode() not in everything
    assert KEY not in caplog.text
    with Bank(folder / "skills.sqlite") as bank:
        assert {skill.source for skill in bank.skills()} & set(waiting)


def test_what_an_environment_calls_secret_is_in_no_skill(make_run: MakeRun, servers: list[FakeEndpoint]) -> None:
    class Secretive(Toy):
        def secrets(self, task: Task) -> Sequence[str]:
            return (f"code {task.id}",)

    servers.append(FakeEndpoint(completion({**SKILL, "golden_workflow": "Say CODE train-3."})))
    run = make_run(toy=Secretive(), training={"iterations": 3}, **settings(servers[0]))
    listener = go(run)
    visited = [group.task.id for group in listener.groups]
    assert listener.iterations[-1]["summaries/rejected_leaks_answer"] == 4 * visited.count("train-3") > 0
    assert {skill.task_id for skill in run.bank.skills()} == set(visited) - {"train-3"}  # no secret of theirs


# -- the policy -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> str:
    path = tmp_path / "bare.txt"
    path.write_text("{trajectory}\n")
    return str(path)


def test_the_policy_writes_rubbish_at_first_and_training_goes_on(make_run: MakeRun, bare: str) -> None:
    options: dict[str, Any] = {
        "skills": {"summariser": "policy"},
        "summariser": {"prompt": bare, "max_output_tokens": 24},
        "training": {"iterations": 3},
    }
    one, two = (go(make_run(folder, **options)).iterations for folder in ("a", "b"))
    record = one[-1]
    assert record["summaries/submitted"] == record["summaries/calls"] == 36
    assert sum(n for name, n in record.items() if name.startswith("summaries/rejected_")) == 36
    assert record["summaries/pending"] == 0
    assert record["summaries/tokens_in"] > 0
    figures = [{k: v for k, v in r.items() if k.startswith(("summaries/", "rollout/reward"))} for r in one + two]
    assert figures[:3] == figures[3:]  # the same seed, the same summaries


def test_what_the_policy_says_becomes_a_skill(make_run: MakeRun, bare: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(
        skills={"summariser": "policy", "teacher_extra_tokens": 200},
        summariser={"prompt": bare, "max_output_tokens": 100, "temperature": 0},
    )
    engine: Any = run.engine
    sample = engine.sample
    asked: list[SampleRequest] = []

    async def eloquent(request: SampleRequest) -> Sample:
        """The model's own way, but its words in the summaries are put into its mouth."""
        if request.session is not None:
            return await sample(request)
        asked.append(request)
        await sample(request)
        said = run.renderer.reply(json.dumps({**SKILL, "golden_workflow": f"{request.seed % 1000}"}))
        return Sample(said, (0.0,) * len(said), "stop")

    monkeypatch.setattr(engine, "sample", eloquent)
    listener = go(run)
    assert len(asked) == 72
    assert {request.temperature for request in asked} == {0}
    assert len({request.seed for request in asked}) == 72
    assert all(len(request.tokens) + request.max_tokens <= run.engine.max_length for request in asked)
    assert "Turn 1" in run.renderer.text(asked[0].tokens)
    assert listener.iterations[-1]["batch/groups_with_teacher"] == 1.0
    assert run.bank.skills()[0].skill.success_analysis == "Left first."


def test_a_policy_without_room_for_a_summary_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"takes 256 tokens: too few for .*max_output_tokens \(1024\)"):
        make_run(skills={"summariser": "policy"})


# -- settings that do not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skills", "summariser", "said"),
    [
        ({"summariser": "openai"}, {}, "summariser.model"),
        ({}, {"model": "gpt"}, "only 'openai' asks a model of that name"),
        ({"summariser": "policy", "deterministic": False}, {}, "Set skills.deterministic to true"),
        ({"summariser": "policy"}, {"prompt": "nonsense"}, "unknown template 'nonsense'"),
        (
            {"summariser": "openai"},
            {"model": "m", "requests_per_minute": 6},
            "concurrency 16 a summary may wait 160 s for its turn, but skills.timeout_seconds is 120",
        ),
        ({"summariser": "openai"}, {"model": "m", "api_key_env": "MISSING"}, "'MISSING' holds no key"),
    ],
)
def test_refused(make_run: MakeRun, skills: dict[str, Any], summariser: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        make_run(skills=skills, summariser=summariser)
    assert said in str(error.value)
